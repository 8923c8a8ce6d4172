"""Objects, namespaces and mounts for the tests of fimbria.kernel; everything goes away with the test."""

from __future__ import annotations

import os
import subprocess
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from compiling import compile_object

from fimbria.kernel import link, netns, probe
from fimbria.kernel.bpf import BpfObject
from fimbria.kernel.netlink import NetlinkSocket

PROGS = Path(__file__).parent / "progs"
CONSTANTS: dict[str, int | bool | bytes] = {"mark": 42, "delta": -7, "enabled": True, "mac": bytes(range(6))}


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.fail("these tests need root", pytrace=False)


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The test programs, compiled: object bytes by stem."""
    out = tmp_path_factory.mktemp("progs")
    objects = {}
    for source in sorted(PROGS.glob("*.bpf.c")):
        objects[source.name.split(".")[0]] = compile_object(source, out).read_bytes()
    return objects


@pytest.fixture
def loaded(compiled: dict[str, bytes]) -> Iterator[BpfObject]:
    """The test object, loaded."""
    with BpfObject(compiled["kernel"], "kernel") as obj:
        obj.set_constants(CONSTANTS)
        obj.load()
        yield obj


@pytest.fixture
def bpffs(tmp_path: Path) -> Iterator[Path]:
    """A BPF file system of the test's own."""
    path = tmp_path / "bpffs"
    path.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(path)], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.fixture
def namespace() -> Iterator[Callable[[], int]]:
    """Makes network namespaces and returns their descriptors."""
    made: list[tuple[str, int]] = []

    def make() -> int:
        os.makedirs(netns.RUN_DIR, exist_ok=True)
        path = f"{netns.RUN_DIR}/fimk{uuid.uuid4().hex[:8]}"
        netns.create(path)
        made.append((path, -1))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        made[-1] = (path, fd)
        return fd

    try:
        yield make
    finally:
        for path, fd in made:
            if fd >= 0:
                os.close(fd)
            netns.delete(path)


@dataclass(frozen=True)
class Pair:
    """Two namespaces joined by a veth: fimv0 (10.0.0.1) in `a`, eth0 (10.0.0.2) in `b`."""

    a: int
    b: int
    a_socket: NetlinkSocket
    b_socket: NetlinkSocket
    a_index: int
    b_index: int


@pytest.fixture
def pair(namespace: Callable[[], int]) -> Iterator[Pair]:
    """Two joined namespaces, everything up."""
    a, b = namespace(), namespace()
    with NetlinkSocket(a) as na, NetlinkSocket(b) as nb:
        na.do(link.create(link.Veth("fimv0", "eth0", peer_netns_fd=b, up=True)))
        near, far = link.get(na, "fimv0"), link.get(nb, "eth0")
        assert near is not None and far is not None
        nb.do(link.change(far.index, up=True))
        na.do(link.add_address(link.Address(near.index, bytes([10, 0, 0, 1]), 24)))
        nb.do(link.add_address(link.Address(far.index, bytes([10, 0, 0, 2]), 24)))
        yield Pair(a, b, na, nb, near.index, far.index)


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A fresh sub-cgroup of the cgroup v2 hierarchy."""
    root = probe.cgroup2_mount()
    assert root is not None, "no cgroup v2 hierarchy is mounted"
    path = Path(root) / f"fimk{uuid.uuid4().hex[:8]}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()
