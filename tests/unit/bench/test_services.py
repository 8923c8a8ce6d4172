"""Objects of the bench's Services, and what is compared with what."""

from tests.bench import services
from tests.bench.prober import ask
from tests.bench.programming import _backends, _turned
from tests.bench.rules import address
from tests.bench.service_data import endpoint_slice, rows, service


def test_a_service_and_its_slice_belong_together() -> None:
    made = dict((resource, body) for resource, _, _, body in rows([service(7)], [endpoint_slice(7, ["10.0.0.1"])]))
    assert made["services"]["spec"]["clusterIP"] == address(7)
    slice_ = made["endpointslices.discovery.k8s.io"]
    assert slice_["metadata"]["labels"]["kubernetes.io/service-name"] == made["services"]["metadata"]["name"]
    assert slice_["ports"][0]["name"] == made["services"]["spec"]["ports"][0]["name"]


def test_a_node_port_is_one_of_the_range() -> None:
    spec = service(1, node_port=31080)["spec"]
    assert spec["type"] == "NodePort" and spec["ports"][0]["nodePort"] == 31080
    assert "nodePort" not in service(1)["spec"]["ports"][0]


def test_nftables_is_spared_30000_services() -> None:
    assert services.PLAN.modes(10_000) == ["iptables", "nftables"]
    assert services.PLAN.modes(30_000) == ["iptables"]


def test_ours_is_compared_with_the_better_mode() -> None:
    samples = {"socket": [90.0] * 3, "direct": [100.0] * 3, "clean": [100.0] * 3, "iptables": [60.0] * 3,
               "nftables": [80.0] * 3}  # fmt: skip
    direct, proxy = services._figures(services.INSIDE, 10, "rr", samples, services.PLAN)
    assert (direct.against, direct.ratio, direct.met) == ("the pod's address", 0.9, False)
    assert (proxy.against, proxy.met) == ("nftables", True)
    assert proxy.note == "of direct: ours 0.90, kube-proxy iptables 0.60, kube-proxy nftables 0.80"


def test_only_the_last_of_many_services_answers() -> None:
    assert len({b for n in range(1, 10) for b in _backends(n, 10)}) == 90
    assert len(_backends(10, 10)) == 1


def test_a_flapping_endpoint_is_the_first_of_its_slice() -> None:
    before = endpoint_slice(1, ["10.0.0.1", "10.0.0.2"])
    before["metadata"]["resourceVersion"] = "5"
    after = _turned(before, ready=False)
    assert [e["conditions"]["ready"] for e in after["endpoints"]] == [False, True]
    assert "resourceVersion" not in after["metadata"] and before["metadata"]["resourceVersion"] == "5"


def test_nobody_answers_the_prober() -> None:
    assert ask(("127.0.0.1", 1)) == "-"
