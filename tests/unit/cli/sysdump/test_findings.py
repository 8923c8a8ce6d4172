"""What is unwell, and the page that is read first."""

import copy
from typing import Any

import pytest

from fimbria.cli.sysdump.findings import Facts, NodeFacts, findings, page

STATUS: dict[str, Any] = {
    "node": "node1", "version": "0.1.0", "kernel": "6.18.1", "pid": 7, "ready": True, "ready_after_seconds": 0.7,
    "uptime_seconds": 11.8, "api_server": {"server": "https://x", "connected": True, "errors": {}}, "devices": {},
    "pod_cidrs": ["10.244.0.0/24"], "node_problem": "", "endpoints": 2,
    "pressure": {"conntrack": {"used": 3000, "room": 100000}, "nat": {"used": 9, "room": 10}},
    "failures": {}, "repaired": {}, "policy_problems": {}, "not_as_asked": {}, "foreign_programs": {},
}  # fmt: skip


def facts(*nodes: NodeFacts, **more: Any) -> Facts:
    return Facts("Cluster x", "now", "fimbria 1", nodes={n.name: n for n in nodes}, **more)


def node(name: str, drops: tuple[tuple[str, int], ...] = (), **status: Any) -> NodeFacts:
    made = NodeFacts(name)
    made.learn("status.json", copy.deepcopy(STATUS) | status)
    made.learn("drops.json", [{"name": n, "packets": p, "direction": "ingress"} for n, p in drops])
    made.learn("plan.json", [])
    return made


def well(name: str, **status: Any) -> NodeFacts:
    return node(name, **({"pressure": {}} | status))


def test_nothing() -> None:
    assert findings(facts(well("a"), well("b"))) == []
    assert "Nothing that this looks for." in page(facts(well("a")), ["nodes/a/status.json"])


def test_each_trouble_is_named() -> None:
    ill = node("a", (("POLICY_DENIED", 5), ("FORWARDED", 7), ("EVENT_LOST", 3)), ready=False,
               policy_problems={"NetworkPolicy shop/x": ["port http isn't known"]},
               foreign_programs={"eth0 ingress": ["other"]}, repaired={"routes": 2})  # fmt: skip
    ill.plan, ill.restarts = 4, 9
    text = "\n".join(findings(facts(ill, well("b", version="0.2.0"), NodeFacts("c", errors={"the agent": "refused"}),
                                    NodeFacts("d", pod="container agent: CrashLoopBackOff"))))  # fmt: skip
    for expected in (
        "**a**: the agent is not ready", "table nat is 90% full", "4 changes in plan.json", "restarted 9 times",
        "policy NetworkPolicy shop/x: port http isn't known", "programs of others at eth0 ingress: other",
        "the version of the agent differs: 0.1.0 on 1 (a); 0.2.0 on 1 (b)", "3 events were lost",
        "**c**: nothing could be asked: refused", "**d**: the agent's pod isn't ready: container agent: CrashLoop",
        "it was repaired",
    ):  # fmt: skip
        assert expected in text


def test_a_policys_problem_stands_once_for_all_nodes() -> None:
    broken = {"policy_problems": {"CiliumNetworkPolicy x/y": ["no"]}}
    assert findings(facts(well("a", **broken), well("b", **broken))) == ["policy CiliumNetworkPolicy x/y: no"]


def test_drops_are_summed() -> None:
    text = page(facts(node("a", (("POLICY_DENIED", 5),)), node("b", (("POLICY_DENIED", 7), ("NO_ROUTE", 1)))), [])
    assert "| POLICY_DENIED | 12 | b 7, a 5 |" in text
    assert "| NO_ROUTE | 1 | b 1 |" in text


def test_the_unwell_come_first_and_no_cell_breaks_the_table() -> None:
    bad = node("z", ready=False)
    bad.version = "a|b\nc"
    rows = [line for line in page(facts(well("a"), bad), []).splitlines() if line.startswith(("| a ", "| z "))]
    assert rows[0].startswith("| z | **not ready** | a\\|b c |")
    assert rows[1].startswith("| a | ready |")


@pytest.mark.parametrize("value", [None, [], {}, {"version": 1}, "x", {"a": {"b": 1}}])
@pytest.mark.parametrize("name", ["status.json", "drops.json", "plan.json", "errors.json"])
def test_answers_of_another_shape_are_noted(name: str, value: Any) -> None:
    made = NodeFacts("a")
    made.learn(name, value)
    assert isinstance(page(facts(made), [f"nodes/a/{name}"]), str)


def test_what_is_missing_is_said() -> None:
    f = facts(
        NodeFacts("a", errors={"maps/x.json": "no time was left"}), missing={"kubernetes/pods.json": "403"}, left_out=7
    )
    text = page(f, ["nodes/a/x", "kubernetes/pods.json"])
    assert "- `nodes/a/maps/x.json`: no time was left" in text
    assert "- `kubernetes/pods.json`: 403" in text
    assert "**7 nodes were left out**" in text
