"""What a test bed runs besides Fimbria, as manifests for `kubectl apply`."""

from __future__ import annotations

from pathlib import Path

from tests.cluster.images.recipes import recipes

HERE = Path(__file__).resolve().parent


def coredns() -> str:
    """The cluster's DNS, of the version that the image is built from."""
    (reference,) = recipes()["coredns"].references
    return (HERE / "coredns.yaml").read_text().replace("registry.k8s.io/coredns/coredns:COREDNS_VERSION", reference)
