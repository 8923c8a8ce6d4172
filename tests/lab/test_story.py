"""The main story, as the demo tells it: pods of several nodes, Services, policies, drops with their rule.

It runs on the embedded API server here, on the real one from tests/kube (FIMBRIA_STORY_KUBECONFIG), on other kernels
from tests/vm (FIMBRIA_STORY_ROUTINGS and _NODES make it smaller there).
"""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from typing import Any

import pytest

from fimbria.lab import cluster, components
from fimbria.lab.demo import APP, POLICIES, SOURCES, TARGETS, WORLD, Demo, DemoPod
from fimbria.lab.errors import LabError
from fimbria.lab.handle import Lab
from fimbria.lab.layout import LabSpec

pytestmark = pytest.mark.timeout(900)

PODS = 8
ROUTINGS = os.environ.get("FIMBRIA_STORY_ROUTINGS", "overlay native").split()
NODES = int(os.environ.get("FIMBRIA_STORY_NODES", "3"))
KUBECONFIG = os.environ.get("FIMBRIA_STORY_KUBECONFIG", "")

# Who reaches what once the policies are there; everything else is dropped.
ALLOWED = {
    "shop/frontend": {"shop/api", "monitoring/prometheus", WORLD},
    "shop/api": {"shop/frontend", "shop/db", "monitoring/prometheus", WORLD},
    "shop/db": {"shop/frontend", "monitoring/prometheus"},
    "monitoring/prometheus": {"shop/frontend", "shop/api", "shop/db", WORLD},
    "guest/visitor": {"monitoring/prometheus", WORLD},
}


class Story:
    """A lab with the demo's application."""

    def __init__(self, spec: LabSpec) -> None:
        self.lab = Lab(spec.name)
        self.demo = Demo(spec)
        self.pods: list[DemoPod] = []

    def run(self, step: Any) -> Any:
        return asyncio.run(step)

    def pod(self, workload: str, node: str = "") -> DemoPod:
        return next(p for p in self.pods if p.workload == workload and node in ("", p.node))

    def logs(self) -> str:
        """What the agents said last: a story that fails in a virtual machine leaves nothing else."""
        nodes = self.demo.spec.node_names
        return "\n".join(components.tail(components.log_path(self.demo.paths, f"{n}/agent"), 15) for n in nodes)

    def matrix(self) -> dict[str, set[str]]:
        cells = self.run(self.demo.matrix(self.pods))
        return {s: {t for t in (*TARGETS, WORLD) if cells[s, t] == "ok"} for s in SOURCES}


@pytest.fixture(scope="module", params=ROUTINGS)
def story(request: pytest.FixtureRequest) -> Iterator[Story]:
    name = f"t{os.getpid()}-s{request.param[0]}"
    spec = LabSpec(name=name, nodes=NODES, routing=request.param, kubeconfig=KUBECONFIG, controllers=bool(KUBECONFIG))
    try:
        cluster.up(spec)
        found = Story(spec)
        found.run(found.demo.apply(APP, lambda _manifest, _what: None))
        found.pods = found.run(found.demo.wait_ready(PODS, lambda _pods: None))
        found.run(found.demo.start_world())
        yield found
    finally:
        cluster.down(name)
    assert cluster.remains(name) == []


def test_pods_are_spread_and_have_addresses_of_both_families(story: Story) -> None:
    assert {p.node for p in story.pods} == set(story.demo.spec.node_names)
    assert all(len(p.ips) == 2 for p in story.pods)
    assert len({ip for p in story.pods for ip in p.ips}) == 2 * PODS


def test_same_labels_have_the_same_identity_on_all_nodes(story: Story) -> None:
    identities = story.run(story.demo.identities())
    by_workload: dict[str, set[int]] = {}
    for p in story.pods:
        by_workload.setdefault(p.workload, set()).add(identities[f"{p.namespace}/{p.name}"])
    assert all(len(numbers) == 1 for numbers in by_workload.values())
    assert len(set.union(*by_workload.values())) == len(by_workload)


def test_every_pod_reaches_every_pod_on_both_families(story: Story) -> None:
    async def all_pairs() -> list[tuple[str, str, str]]:
        async def one(source: DemoPod, target: DemoPod, ip: str) -> tuple[str, str, str]:
            port = {"db": 5432, "prometheus": 9090}.get(target.app, 8080)
            return source.name, ip, (await story.demo.probe(source, ip, port, timeout_ms=3500))[0]["result"]

        sources = [story.pod("shop/frontend"), story.pod("guest/visitor"), story.pod("shop/db")]
        return [await one(s, t, ip) for s in sources for t in story.pods for ip in t.ips]

    assert [r for r in story.run(all_pairs()) if r[2] != "ok"] == []


def test_a_service_spreads_connections_over_all_nodes(story: Story) -> None:
    spread = story.run(story.demo.spread(story.pod("shop/frontend"), "shop/api", 90))
    backends = {p.name for p in story.pods if p.workload == "shop/api"}
    assert len(spread) == 2, "one address of each family"
    for counts in spread.values():
        assert set(counts) == backends
        assert sum(counts.values()) == 90


def test_before_policies_everything_is_open(story: Story) -> None:
    assert story.matrix() == {s: {*TARGETS, WORLD} - {s} for s in SOURCES}


def test_a_gone_address_answers_unreachable_at_once(story: Story) -> None:
    source = story.pod("shop/frontend")
    other = next(p for p in story.pods if p.node != source.node)
    gone = other.ips[0].rsplit(".", 1)[0] + ".250"
    # On one machine the answer can arrive while connect() still holds the socket; Linux then acts on the next one, a
    # retransmission later. Without an answer it would take minutes.
    result = story.run(story.demo.probe(source, gone, 80, timeout_ms=4000))[0]
    assert result["result"] == "unreachable", result
    assert result["latency_us"] < 2_500_000


def test_outside_sees_the_nodes_address(story: Story) -> None:
    source = story.pod("guest/visitor")
    answer = story.run(story.demo.probe(source, story.demo.spec.world.ipv4, 8080))[0]["answer"]
    assert answer["peer"].rsplit(":", 1)[0] == story.demo.spec.node(source.node).ipv4


def test_policies_allow_what_they_say_and_nothing_else(story: Story) -> None:
    story.run(story.demo.apply(POLICIES, lambda _manifest, _what: None))
    with contextlib.suppress(LabError):
        story.lab.wait("policies are enforced", lambda: story.matrix() == ALLOWED, 30)
    assert story.matrix() == ALLOWED, story.logs()


def test_a_drop_is_reported_with_the_policy_behind_it(story: Story) -> None:
    story.run(story.demo.probe(story.pod("guest/visitor"), *story.run(story.demo.services())["shop/api"][0]))
    story.run(story.demo.probe(story.pod("shop/db"), *story.run(story.demo.services())["shop/api"][0]))

    def reasons() -> set[tuple[str, str]]:
        flows = story.run(story.demo.flows(200, "&verdict=DROPPED"))
        return {
            (f["drop_reason_desc"], rule["name"])
            for f in flows
            for rule in (*f.get("ingress_denied_by", ()), *f.get("egress_denied_by", ()))
        }

    wanted = {("POLICY_DENY", "no-guests"), ("POLICY_DENIED", "default-deny")}
    story.lab.wait("drops are reported", lambda: wanted <= reasons(), 30)


def test_the_kernel_is_as_wanted(story: Story) -> None:
    for node in story.demo.spec.node_names:
        plan = story.run(_agent_get(story, node, "plan"))
        assert plan == [], node
        status = story.run(_agent_get(story, node, "status"))
        assert status["ready"] and status["failures"] == {}, status


async def _agent_get(story: Story, node: str, what: str) -> Any:
    import aiohttp

    from fimbria.lab import access

    path = access.node_root(story.demo.paths, node) / "run/fimbria/agent.sock"
    connector = aiohttp.UnixConnector(str(path))
    async with aiohttp.ClientSession(connector=connector) as s, s.get(f"http://agent/v1/{what}") as response:
        return await response.json()
