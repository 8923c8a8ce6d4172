"""From services to the backend that a packet gets: computed rows, encoded, in real maps, selected by lib/service.h."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from compiling import compile_object
from datapath import show
from selection import INSIDE, SOURCE, Result, Selection

from fimbria.compute.service import BACKENDS, FRONTENDS, SLOTS, Delta, ServiceCompute
from fimbria.decide.numbers import Numbers
from fimbria.kernel.bpf import BpfObject
from fimbria.model.address import pack
from fimbria.model.rows import Backend, FrontendKey
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort

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
        self.rows = Selection(obj)

    def write(self, delta: Delta) -> None:
        for name in (BACKENDS, SLOTS, FRONTENDS):
            for key, row in delta.upserts[name].items():
                self.rows.put(name, key, row)
        for name in (FRONTENDS, SLOTS, BACKENDS):
            for key in delta.deletes[name]:
                self.rows.delete(name, key)

    def select(self, frontend: FrontendKey) -> Backend | Result:
        answer = self.rows.ask((show(frontend.addr), frontend.port), proto=frontend.proto, flags=INSIDE)
        if answer.result != Result.FOUND:
            return answer.result
        return Backend(pack(answer.to[0]), answer.to[1], frontend.proto)


@pytest.fixture(scope="module")
def object_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_object(SOURCE, tmp_path_factory.mktemp("bpf"))


@pytest.fixture
def kernel(object_file: Path) -> Iterator[Kernel]:
    with BpfObject(object_file) as obj:
        yield Kernel(obj)


@pytest.fixture
def compute() -> ServiceCompute:
    return ServiceCompute("here", Numbers("service ports"), Numbers("backends"))


@pytest.mark.parametrize("v4", [True, False], ids=["ipv4", "ipv6"])
def test_every_backend_is_selected(kernel: Kernel, compute: ServiceCompute, v4: bool) -> None:
    kernel.write(compute.update(KEY, SERVICE, slices(0, 1, 2, 3, 4)))
    found = {kernel.select(FrontendKey(IPS[0 if v4 else 1], 80, 6)) for _ in range(200)}
    assert found == {Backend(addr, 8080, 6) for addr in ENDPOINTS[v4]}


def test_no_service_and_no_backend_are_told_apart(kernel: Kernel, compute: ServiceCompute) -> None:
    kernel.write(compute.update(KEY, SERVICE))
    assert kernel.select(FrontendKey(IPS[0], 80, 6)) == Result.REFUSE
    assert kernel.select(FrontendKey(pack("10.96.0.2"), 80, 6)) == Result.NONE


def test_changes_end_where_a_fresh_start_would(kernel: Kernel, compute: ServiceCompute) -> None:
    frontend = FrontendKey(IPS[0], 80, 6)
    for indexes in ((0, 1, 2, 3, 4), (1, 2, 3), (3,), (0, 3, 4), (), (2, 4)):
        kernel.write(compute.update(KEY, SERVICE, slices(*indexes)))
        found: set[Backend | Result] = {kernel.select(frontend) for _ in range(100)}
        expected: set[Backend | Result] = {Backend(ENDPOINTS[True][i], 8080, 6) for i in indexes}
        assert found == (expected or {Result.REFUSE})
    kernel.write(compute.update(KEY, None))
    assert kernel.select(frontend) == Result.NONE
    assert not any(list(m.items()) for m in kernel.rows.maps.values())
