"""A node's part, from an agent with canned answers on a real socket and this machine's own kernel."""

import io
import json
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from fimbria.cli.local import Local
from fimbria.cli.sysdump import machine
from fimbria.cli.sysdump.archive import Stream, unpack
from fimbria.cli.sysdump.local import FULL, NORMAL, QUICK, Node

Call = Callable[..., Result]
MAPS = [
    {"name": "conntrack", "key_size": 40, "wanted": None, "entries": 9, "max_entries": 99, "type": 9, "id": 1},
    {"name": "events", "key_size": 0, "wanted": None, "entries": None, "max_entries": 99, "type": 27, "id": 2},
]
LARGE = 1_000_000


def answers(agent: Any, **more: Any) -> None:
    agent.answers |= {
        name: [] for name in ("nodes", "endpoints", "identities", "ipcache", "services", "policies", "plan")
    }
    agent.answers |= {
        "maps": MAPS,
        "maps/metrics": [{"name": "POLICY_DENIED", "packets": 3}],
        "metrics": "# HELP x\nx 1\n",
    }
    agent.answers |= {"maps/conntrack": [{"key": {"addr": "10.0.0.1"}, "value": {"secret": "hunter2"}}]} | more


def collect(run_dir: Path, **options: Any) -> dict[str, bytes]:
    sink = io.BytesIO()
    stream = Stream(sink)
    Node(stream, Local("agent", run_dir / "agent.sock"), **options).collect()
    stream.close()
    return dict(unpack(io.BytesIO(sink.getvalue())))


def test_everything(agent: Any, observer: Any, run_dir: Path) -> None:
    answers(agent)
    observer.answers |= {"status": {"flows": 1}, "flows": '{"verdict":"DROPPED"}\n'}
    agent.answers["endpoints"] = [{"id": 7}]
    agent.answers["endpoints/7"] = {"id": 7, "entries": []}
    (run_dir / "state").mkdir()
    (run_dir / "state" / "7.json").write_text('{"id": 7,\n "token": "hunter2"}')
    found = collect(run_dir)
    assert json.loads(found["status.json"])["node"] == "node1"
    assert json.loads(found["endpoints/7.json"])["id"] == 7
    assert json.loads(found["maps/conntrack.json"])[0]["key"]["addr"] == "10.0.0.1"
    assert "maps/events.json" not in found
    assert b"net.ipv4.ip_forward" in found["kernel/sysctl.txt"]
    assert json.loads(found["network/links.json"])[0]["name"] == "lo"
    assert any("127.0.0.0/8" in r for r in json.loads(found["network/routes.json"])["ipv4"])
    assert b"7.json" in found["journal/journal.ndjson"]
    assert not [name for name, data in found.items() if b"hunter2" in data]
    asked = dict(agent.asked)
    assert asked["/v1/maps/conntrack"] == {"most": "5000"}, "no agent decodes a million rows for an archive"


def test_what_others_know_of_a_node_without_an_agent(run_dir: Path) -> None:
    found = collect(run_dir)
    errors = json.loads(found["errors.json"])
    assert "No agent runs on this node" in errors["status.json"]
    assert "kernel/version.txt" in found
    assert "network/routes.json" in found


def test_an_agent_that_hangs_costs_its_patience_once(
    agent: Any, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fimbria.cli.local.TIMEOUT", 0.3)
    agent.answers["status"] = lambda: time.sleep(1.0) or {}
    found = collect(run_dir)
    assert [path for path, _ in agent.asked] == ["/v1/status"], "who has hung once isn't asked again"
    errors = json.loads(found["errors.json"])
    assert "hangs" in errors["status.json"]
    assert "hangs" in errors["plan.json"]
    assert "kernel/version.txt" in found


def test_time_is_bounded(agent: Any, run_dir: Path) -> None:
    answers(agent)
    errors = json.loads(collect(run_dir, seconds=0.0)["errors.json"])
    assert set(errors.values()) == {"no time was left"}


@pytest.mark.parametrize(("detail", "taken"), [(QUICK, False), (NORMAL, False), (FULL, True)])
def test_large_tables_are_left_to_those_who_ask(agent: Any, run_dir: Path, detail: str, taken: bool) -> None:
    answers(agent, status=agent.answers["status"] | {"rows": {"ipcache": LARGE}})
    found = collect(run_dir, detail=detail)
    assert ("ipcache.json" in found) is taken
    if not taken:
        assert "ipcache.json" in json.loads(found["errors.json"])
    assert ("maps/conntrack.json" in found) is (detail != QUICK)


def test_the_command(agent: Any, call: Call, tmp_path: Path) -> None:
    answers(agent)
    target = tmp_path / "out.zip"
    done = call("sysdump", "--local", "-o", str(target))
    assert done.exit_code == 0, done.output
    with zipfile.ZipFile(target) as package:
        names = {n.partition("/")[2] for n in package.namelist()}
        readme = next(package.read(n).decode() for n in package.namelist() if n.endswith("README.md"))
    assert {"README.md", "status.json", "errors.json", "kernel/sysctl.txt"} <= names
    assert "| POLICY_DENIED | 3 |" in readme
    assert str(target) in done.stdout


def test_a_folder_that_is_not_there(call: Call, run_dir: Path) -> None:
    done = call("sysdump", "--local", "-o", str(run_dir / "none" / "x.zip"))
    assert done.exit_code == 1
    assert "No such file or directory" in done.stderr


@pytest.mark.parametrize("since", ["x", "10", "1w", "-1h"])
def test_since_that_cannot_be_understood(call: Call, since: str) -> None:
    done = call("sysdump", "--since", since)
    assert done.exit_code == 2
    assert "expected a number and s, m, h or d" in done.stderr


def test_rules_and_addresses_of_this_machine() -> None:
    rules = machine.network()["rules"]()
    assert {r["table"] for r in rules} >= {254, 255}
    assert any(a["address"] == "127.0.0.1" for a in machine.network()["addresses"]())
