"""Which service ids may have lost a backend, and whether what a client has with one may go on."""

from dataclasses import replace

import pytest

from fimbria.compute.service import ServiceCompute
from fimbria.decide.numbers import Numbers
from fimbria.model.address import pack
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort

DNS = ServiceKey("kube-system", "dns")
SERVICE = Service(DNS, (pack("10.96.0.10"),), (ServicePort("dns", 53, 17),))
ONE, TWO = pack("10.0.0.1"), pack("10.0.0.2")
GONE = None


def endpoint(addr: bytes, *, ready: bool = True, serving: bool = True, terminating: bool = False) -> Endpoint:
    return Endpoint(addr, "here", ready, serving, terminating)


def part(*endpoints: Endpoint, name: str = "s", weight: int = 100) -> EndpointSlice:
    return EndpointSlice(name, DNS, True, (EndpointPort("dns", 5353, 17),), endpoints, weight=weight)


@pytest.fixture
def compute() -> ServiceCompute:
    made = ServiceCompute("here", Numbers("service ports"), Numbers("backends"))
    made.update(DNS, SERVICE, (part(endpoint(ONE), endpoint(TWO)),))
    made.take_losing()
    return made


def keeps(compute: ServiceCompute, addr: bytes) -> bool:
    return compute.keeps(1, addr, 5353)


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        (endpoint(ONE), True),
        (endpoint(ONE, ready=False, terminating=True), True),  # says good-bye to its clients
        (endpoint(ONE, ready=False, serving=False, terminating=True), False),
        (endpoint(ONE, ready=False, serving=False), False),
        (GONE, False),
    ],
)
def test_a_backend_is_kept_while_it_serves(compute: ServiceCompute, after: Endpoint | None, kept: bool) -> None:
    compute.update(DNS, SERVICE, (part(*([after] if after else []), endpoint(TWO)),))
    assert keeps(compute, ONE) is kept
    assert keeps(compute, TWO)
    assert compute.take_losing() == (set() if kept else {1})


def test_one_that_left_the_slots_earlier_is_noticed_when_it_stops_serving(compute: ServiceCompute) -> None:
    """No row changes then."""
    leaving = endpoint(ONE, ready=False, terminating=True)
    compute.update(DNS, SERVICE, (part(leaving, endpoint(TWO)),))
    assert compute.take_losing() == set()
    compute.update(DNS, SERVICE, (part(leaving._replace(serving=False), endpoint(TWO)),))
    assert compute.take_losing() == {1}
    assert not keeps(compute, ONE)


def test_whoever_is_only_drained_keeps_his_clients(compute: ServiceCompute) -> None:
    compute.update(DNS, SERVICE, (part(endpoint(ONE), weight=0), part(endpoint(TWO), name="t")))
    assert keeps(compute, ONE) and keeps(compute, TWO)


def test_more_backends_lose_nobody(compute: ServiceCompute) -> None:
    compute.update(DNS, SERVICE, (part(endpoint(ONE), endpoint(TWO), endpoint(pack("10.0.0.3"))),))
    assert compute.take_losing() == set()


def test_publishing_those_that_are_not_ready_keeps_them(compute: ServiceCompute) -> None:
    still = part(endpoint(ONE, ready=False, serving=False), endpoint(TWO))
    compute.update(DNS, replace(SERVICE, publish_not_ready=True), (still,))
    assert keeps(compute, ONE)


def test_a_service_that_is_gone_keeps_nobody(compute: ServiceCompute) -> None:
    compute.update(DNS, None)
    assert compute.take_losing() == {1}
    assert not keeps(compute, ONE)


def test_another_port_of_a_backend_is_another_backend(compute: ServiceCompute) -> None:
    assert not compute.keeps(1, ONE, 53)
    assert not compute.keeps(99, ONE, 5353)


def test_an_endpoint_is_listed_as_long_as_any_slice_has_it(compute: ServiceCompute) -> None:
    compute.update(DNS, SERVICE, (part(endpoint(ONE, ready=False, serving=False)),))
    assert compute.lists(ONE, 5353)
    assert not compute.lists(TWO, 5353)
    assert not compute.lists(ONE, 53)


def test_each_loss_is_told_once(compute: ServiceCompute) -> None:
    compute.update(DNS, SERVICE, (part(endpoint(TWO)),))
    assert compute.take_losing() == {1}
    assert compute.take_losing() == set()
