"""`fimbria status` from canned answers."""

import json
from pathlib import Path

from fimbria.cli.status import problems

NOT_READY = {"ready": False, "pod_cidrs": [], "devices": None}


def test_well(call, agent) -> None:
    result = call("status")
    assert result.exit_code == 0
    for text in ("node1", "ready after 0.7 s", "connected", "overlay", "attached by tcx", "2 of 253 used", "3 nodes"):
        assert text in result.stdout
    assert "Failures" not in result.stdout
    assert "not running" in result.stdout  # the observer


def test_observer_beside(call, agent, observer) -> None:
    observer.answers["status"] = {"seen_flows": 42}
    assert "42 flows seen" in call("status").stdout


def test_failures_name_the_rows(call, agent) -> None:
    agent.answers["status"]["failures"] = {"ipcache": [f"prefix 10.0.0.{i}/32: the map is full" for i in range(9)]}
    result = call("status")
    assert result.exit_code == 1
    assert "ready, but not well" in result.stdout
    assert "9 rows of ipcache can't be written: prefix 10.0.0.0/32: the map is full" in result.stdout
    assert "ipcache: and 4 more" in result.stdout


def test_not_ready_says_why(call, agent) -> None:
    agent.answers["status"] |= NOT_READY
    result = call("status")
    assert result.exit_code == 1
    assert "the operator hands them out" in result.stdout


def test_warnings_do_not_make_it_unwell(call, agent) -> None:
    agent.answers["status"] |= {
        "repaired": {"routes": 2},
        "not_as_asked": {"pod a/b": ["host port 80/TCP is the node port of service a/c"]},
        "policy_problems": {"NetworkPolicy a/b": ["ingress[0]: bad CIDR"]},
        "foreign_programs": {"eth0 ingress": ["someone"]},
    }
    result = call("status")
    assert result.exit_code == 0
    for text in ("routes 2", "a/b: ingress[0]: bad CIDR", "is the node port of service a/c", "eth0 ingress: someone"):
        assert text in result.stdout


def test_nearly_full_tables_are_shown_with_what_fills_them(call, agent) -> None:
    agent.answers["status"]["pressure"] |= {
        "frontends": {"used": 85, "room": 100},
        "nat ports": {"used": 15000, "room": 16384, "fullest": "TCP 192.0.2.1:443"},
    }
    shown = call("status").stdout
    assert "conntrack 3% of 100000" in shown
    assert "frontends 85% of 100" in shown
    assert "nat ports 92% of 16384 (TCP 192.0.2.1:443)" in shown


def test_json_is_the_agents_answer_with_problems(call, agent) -> None:
    agent.answers["status"]["node_problem"] = "two pod CIDRs overlap"
    result = call("status", "-o", "json")
    value = json.loads(result.stdout)
    assert result.exit_code == 1
    assert value["problems"] == ["two pod CIDRs overlap"]
    assert value["node"] == "node1"
    assert value["observer"] is None


def test_lost_api_server(agent) -> None:
    lost = {"server": "https://a", "connected": False, "errors": {"pods": "connection refused", "nodes": ""}}
    found = problems(agent.answers["status"] | {"api_server": lost})
    assert found == ["the API server https://a can't be followed (nodes, pods): connection refused"]


def test_verbose_has_rows_and_devices(call, agent) -> None:
    result = call("status", "--verbose")
    assert "ipcache               18" in result.stdout
    assert "pod_mtu 1450" in result.stdout


def test_wait_says_what_for_and_succeeds(call, agent) -> None:
    good = agent.answers["status"]
    answers = iter([good | NOT_READY, good | NOT_READY])
    agent.answers["status"] = lambda: next(answers, good)
    result = call("status", "--wait", "--timeout", "20")
    assert result.exit_code == 0
    assert result.stderr.count("waiting: the agent is not ready") == 1


def test_wait_gives_up(call, agent) -> None:
    agent.answers["status"] |= NOT_READY
    assert call("status", "--wait", "--timeout", "0.1").exit_code == 1


def test_wait_for_an_agent_that_never_comes(call, run_dir: Path) -> None:
    result = call("status", "--wait", "--timeout", "0.1")
    assert result.exit_code == 2
    assert "waiting: No agent runs on this node" in result.stderr


def test_version(call, agent) -> None:
    result = call("version")
    assert result.exit_code == 0
    assert "node node1" in result.stdout
    assert json.loads(call("version", "-o", "json").stdout)["agent"] == "0.1.0"


def test_version_without_an_agent(call) -> None:
    result = call("version", "-o", "json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["agent"] is None
    assert "No agent runs" in call("version").stdout
