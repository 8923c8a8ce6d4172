"""An OCI image layout in one tar under several names (OCI image specification, chapter "image layout")."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# containerd names an image by the first; the second is what the specification knows
NAME_ANNOTATIONS = ("io.containerd.image.name", "org.opencontainers.image.ref.name")


def index_of(manifest: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The index of a layout that holds one image: its descriptor once for each name."""
    entries = [manifest | {"annotations": dict.fromkeys(NAME_ANNOTATIONS, name)} for name in names]
    return {"schemaVersion": 2, "manifests": entries}


def write_archive(layout: Path, names: Sequence[str], out: Path) -> None:
    """Packs a layout folder of exactly one image. The file appears whole or not at all. Raises ValueError, OSError."""
    manifests = json.loads((layout / "index.json").read_bytes())["manifests"]
    if len(manifests) != 1:
        raise ValueError(f"{layout}: {len(manifests)} images instead of one")
    index = json.dumps(index_of(manifests[0], names)).encode()
    partial = out.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        _add(tar, "oci-layout", (layout / "oci-layout").read_bytes())
        _add(tar, "index.json", index)
        for blob in sorted((layout / "blobs" / "sha256").iterdir()):
            tar.add(blob, f"blobs/sha256/{blob.name}", recursive=False)
    partial.rename(out)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))
