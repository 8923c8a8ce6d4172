"""The bed itself: what it brings up is a Kubernetes, and nothing of it is left."""

from __future__ import annotations

from tests.cluster.bed import Cluster


def test_nodes_have_both_families_and_no_taint(cluster: Cluster) -> None:
    for node in cluster.get("nodes")["items"]:
        kinds = [a["type"] for a in node["status"]["addresses"]]
        assert kinds.count("InternalIP") == 2
        assert not [t for t in node["spec"].get("taints", []) if "not-ready" in t["key"]]
