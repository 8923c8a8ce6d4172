"""What the local API tells of Services."""

from types import SimpleNamespace
from typing import Any

from fimbria.agent import views
from fimbria.agent.engine import DesiredRows
from fimbria.compute.service import ServiceCompute
from fimbria.compute.service_frontends import Defaults
from fimbria.compute.service_rows import MAPS
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix, pack
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort

KEY = ServiceKey("shop", "web")
WEB = Service(
    KEY,
    (pack("10.96.0.1"), pack("fd96::1")),
    (ServicePort("http", 80, 6, 30080),),
    load_balancer_ips=(pack("203.0.113.1"),),
    external_ips=(pack("198.51.100.7"),),
    external_local=True,
    affinity_seconds=60,
    source_ranges=(Prefix.parse("192.0.2.0/24"),),
    source_deny=True,
)


def shown(*services: Service) -> list[dict[str, Any]]:
    compute = ServiceCompute("here", Numbers("s"), Numbers("b"), Defaults("hybrid", "maglev"))
    rows = DesiredRows()
    for service in services:
        endpoint = Endpoint(pack("10.0.0.1"), "there")
        part = EndpointSlice("s1", service.key, True, (EndpointPort("http", 8080, 6),), (endpoint,))
        compute.update(service.key, service, (part,))
    for name in MAPS:
        getattr(rows, name).put_many(compute.all_rows()[name])
    agent: Any = SimpleNamespace(rows=rows, engine=SimpleNamespace(services=compute))
    return views.services(agent)


def test_every_kind_of_frontend() -> None:
    found = {(r["frontend"], r["scope"]): r for r in shown(WEB)}
    assert {key: (r["type"], r["policy"], r["without_backends"], r["backends"]) for key, r in found.items()} == {
        ("10.96.0.1:80", "all"): ("ClusterIP", "Cluster", "refuse", ["10.0.0.1:8080"]),
        ("[fd96::1]:80", "all"): ("ClusterIP", "Cluster", "refuse", []),
        ("0.0.0.0:30080", "outside"): ("NodePort", "Local", "drop", []),
        ("0.0.0.0:30080", "inside"): ("NodePort", "Cluster", "refuse", ["10.0.0.1:8080"]),
        ("[::]:30080", "outside"): ("NodePort", "Local", "refuse", []),
        ("[::]:30080", "inside"): ("NodePort", "Cluster", "refuse", []),
        ("203.0.113.1:80", "outside"): ("LoadBalancer", "Local", "drop", []),
        ("203.0.113.1:80", "inside"): ("LoadBalancer", "Cluster", "refuse", ["10.0.0.1:8080"]),
        ("198.51.100.7:80", "outside"): ("ExternalIP", "Local", "drop", []),
        ("198.51.100.7:80", "inside"): ("ExternalIP", "Cluster", "refuse", ["10.0.0.1:8080"]),
    }
    balancer = found["203.0.113.1:80", "outside"]
    assert (balancer["source_policy"], balancer["source_ranges"]) == ("deny", ["192.0.2.0/24"])
    assert (balancer["forwarding"], balancer["algorithm"], balancer["affinity_seconds"]) == ("dsr", "maglev", 60)
    cluster = found["10.96.0.1:80", "all"]
    assert (cluster["source_policy"], cluster["forwarding"], cluster["algorithm"]) == ("", "", "random")
    assert {r["service"] for r in found.values()} == {"shop/web"}


def test_a_service_that_lost_everything_is_shown_with_its_warnings() -> None:
    late = Service(ServiceKey("shop", "zzz"), (pack("10.96.0.1"),), (ServicePort("http", 80, 6),))
    row = next(r for r in shown(WEB, late) if r["service"] == "shop/zzz")
    assert (row["frontend"], row["backends"]) == ("", [])
    assert row["warnings"] == ["port 80 of 10.96.0.1 already belongs to service shop/web"]
    assert row.keys() == shown(WEB)[0].keys()


def test_nothing_but_a_warning() -> None:
    bad = Service(KEY, (), (), warnings=("cluster IP 'x' is not an IP address",))
    assert [r["warnings"] for r in shown(bad)] == [["cluster IP 'x' is not an IP address"]]
