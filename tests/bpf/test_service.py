"""From services to the backend that a packet gets: computed rows, encoded, in real maps, selected by lib/service.h."""

import struct
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fimbria
from fimbria.compute.service import BACKENDS, FRONTEND_CLUSTER_IP, FRONTENDS, SLOTS, Delta, ServiceCompute
from fimbria.decide.numbers import Numbers
from fimbria.kernel.bpf import BpfObject, prog_test_run
from fimbria.kernel.btf import Btf, enum_values
from fimbria.kernel.codec import Codec
from fimbria.model.address import pack
from fimbria.model.rows import Backend, Frontend, FrontendKey, SlotKey
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort

HERE = Path(__file__).parent
LAYOUT = Path(fimbria.__file__).parent / "_bpf" / "layout.bpf.o"
NO_FRONTEND, NO_BACKEND = -1, -2
KEY = ServiceKey("default", "web")
IPS = (pack("10.96.0.1"), pack("fd96::1"))
SERVICE = Service(KEY, IPS, (ServicePort("http", 80, 6),))
ENDPOINTS = {True: [pack(f"10.0.0.{n}") for n in range(1, 6)], False: [pack(f"fd00::{n}") for n in range(1, 6)]}


def slices(*indexes: int) -> list[EndpointSlice]:
    port = (EndpointPort("http", 8080, 6),)
    return [
        EndpointSlice(f"s{v4}", KEY, v4, port, tuple(Endpoint(addrs[i]) for i in indexes))
        for v4, addrs in ENDPOINTS.items()
    ]


class Kernel:
    """The maps, written as the agent does it: references first, and the reverse on the way out."""

    def __init__(self, obj: BpfObject) -> None:
        btf = Btf.from_elf(LAYOUT)
        self.frontend_key = Codec(btf, "frontend_key", FrontendKey)
        self.backend = Codec(btf, "backend", Backend)
        self.slot_key = Codec(btf, "slot_key", SlotKey)
        self.frontend = Codec(btf, "frontend", Frontend)
        self.maps = {name: obj.map(name) for name in (BACKENDS, SLOTS, FRONTENDS)}
        self.program = obj.program("service_test")

    def write(self, delta: Delta) -> None:
        for name in (BACKENDS, SLOTS, FRONTENDS):
            for key, row in delta.upserts[name].items():
                self.maps[name].update(self.key(name, key), self.row(name, row))
        for name in (FRONTENDS, SLOTS, BACKENDS):
            for key in delta.deletes[name]:
                assert self.maps[name].delete(self.key(name, key))

    def key(self, name: str, key: Any) -> bytes:
        if name == BACKENDS:
            return struct.pack("=I", key)
        return self.slot_key.encode(key) if name == SLOTS else self.frontend_key.encode(key)

    def row(self, name: str, row: Any) -> bytes:
        if name == SLOTS:
            return struct.pack("=I", row)
        return self.backend.encode(row) if name == BACKENDS else self.frontend.encode(row)

    def select(self, frontend: FrontendKey, random: int) -> Backend | int:
        packet = self.frontend_key.encode(frontend) + struct.pack("=I", random)
        run = prog_test_run(self.program.fd, packet)
        return run.retval if run.retval < 0 else self.backend.decode(run.data_out[: self.backend.size])


@pytest.fixture(scope="module")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = HERE / "service_select.bpf.c", tmp_path_factory.mktemp("bpf") / "service_select.bpf.o"
    flags = ["-O2", "-g", "-target", "bpf", "-mcpu=v3", "-Wall", "-Wextra", "-Werror"]
    places = [f"-I{HERE.parent.parent / 'bpf'}", "-idirafter", "/usr/include/x86_64-linux-gnu"]
    subprocess.run(["clang-19", *flags, *places, "-c", str(source), "-o", str(target)], check=True)
    return target


@pytest.fixture
def kernel(object_file: Path) -> Iterator[Kernel]:
    with BpfObject(object_file) as obj:
        obj.load()
        yield Kernel(obj)


@pytest.fixture
def compute() -> ServiceCompute:
    return ServiceCompute("here", Numbers("service ports"), Numbers("backends"))


@pytest.mark.parametrize("v4", [True, False], ids=["ipv4", "ipv6"])
def test_every_backend_is_selected_as_often_as_any_other(kernel: Kernel, compute: ServiceCompute, v4: bool) -> None:
    kernel.write(compute.update(KEY, SERVICE, slices(0, 1, 2, 3, 4)))
    frontend = FrontendKey(IPS[0 if v4 else 1], 80, 6)
    hits = Counter(kernel.select(frontend, random) for random in range(100))
    assert hits == {Backend(addr, 8080, 6): 20 for addr in ENDPOINTS[v4]}


def test_no_service_and_no_backend_are_told_apart(kernel: Kernel, compute: ServiceCompute) -> None:
    kernel.write(compute.update(KEY, SERVICE))
    assert kernel.select(FrontendKey(IPS[0], 80, 6), 5) == NO_BACKEND
    for other in (FrontendKey(IPS[0], 81, 6), FrontendKey(IPS[0], 80, 17), FrontendKey(pack("10.96.0.2"), 80, 6)):
        assert kernel.select(other, 5) == NO_FRONTEND


def test_changes_end_where_a_fresh_start_would(kernel: Kernel, compute: ServiceCompute) -> None:
    frontend = FrontendKey(IPS[0], 80, 6)
    for indexes in ((0, 1, 2, 3, 4), (1, 2, 3), (3,), (0, 3, 4), (), (2, 4)):
        kernel.write(compute.update(KEY, SERVICE, slices(*indexes)))
        found: set[Backend | int] = {kernel.select(frontend, random) for random in range(20)}
        expected: set[Backend | int] = {Backend(ENDPOINTS[True][i], 8080, 6) for i in indexes}
        assert found == (expected or {NO_BACKEND})
    kernel.write(compute.update(KEY, None))
    assert kernel.select(frontend, 0) == NO_FRONTEND
    assert not any(list(m.items()) for m in kernel.maps.values())


def test_a_slot_without_its_backend_is_no_backend(kernel: Kernel, compute: ServiceCompute) -> None:
    kernel.write(compute.update(KEY, SERVICE, slices(0)))
    kernel.maps[BACKENDS].delete(struct.pack("=I", 1))
    kernel.maps[BACKENDS].delete(struct.pack("=I", 2))
    assert kernel.select(FrontendKey(IPS[0], 80, 6), 0) == NO_BACKEND


def test_the_flag_is_the_one_of_the_datapath() -> None:
    assert enum_values(Btf.from_elf(LAYOUT), "frontend_flag")["FRONTEND_CLUSTER_IP"] == FRONTEND_CLUSTER_IP
