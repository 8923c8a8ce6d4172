"""Maps, plan and metrics from canned answers."""

import json

import pytest

MAP = {
    "name": "ipcache",
    "id": 9,
    "type": 11,
    "key_size": 20,
    "value_size": 24,
    "max_entries": 20,
    "wanted": 19,
    "entries": None,
}
CONNTRACK = MAP | {"name": "conntrack", "type": 9, "wanted": None, "entries": 1, "max_entries": 1000}
EVENTS = MAP | {"name": "events", "type": 27, "wanted": None}


def test_map_list(call, agent) -> None:
    agent.answers["maps"] = [CONNTRACK, EVENTS, MAP]
    lines = [line.split() for line in call("map", "list").stdout.splitlines()]
    assert lines == [
        ["NAME", "TYPE", "ROWS", "MAX", "FILL"],
        ["conntrack", "lru_hash", "1", "1000", "<1%"],
        ["events", "ringbuf", "-", "20", "-"],
        ["ipcache", "lpm_trie", "19", "20", "95%"],
    ]
    value = json.loads(call("map", "list", "-o", "json").stdout)
    assert [(m["type_name"], m["rows"]) for m in value] == [("lru_hash", 1), ("ringbuf", None), ("lpm_trie", 19)]


def test_map_dump(call, agent) -> None:
    rows = [{"key": {"prefix": "10.0.0.0/8"}, "value": {"identity": n, "flags": 1}} for n in (2, 300)]
    agent.answers["maps/ipcache"] = rows
    lines = call("map", "dump", "ipcache").stdout.splitlines()
    assert lines[0].split() == ["PREFIX", "IDENTITY", "FLAGS"]
    assert lines[1].split() == ["10.0.0.0/8", "2", "1"]
    assert json.loads(call("map", "dump", "ipcache", "-o", "json", "--grep", "identity=300").stdout) == rows[1:]
    assert "no such rows" in call("map", "dump", "ipcache", "--grep", "nothing").stderr


def test_map_dump_keeps_both_of_equal_names(call, agent) -> None:
    agent.answers["maps/m"] = [{"key": {"addr": "a", "port": 1}, "value": {"addr": "b"}}]
    assert call("map", "dump", "m").stdout.splitlines()[0].split() == ["ADDR", "PORT", "VALUE.ADDR"]


def test_map_dump_empty_and_unknown(call, agent) -> None:
    agent.answers["maps/nat"] = []
    assert "Map nat is empty." in call("map", "dump", "nat").stderr
    agent.answers["maps/x"] = (404, {"error": "there is no map 'x'; there are nat"})
    result = call("map", "dump", "x")
    assert result.exit_code == 1
    assert "There is no map 'x'; there are nat." in result.stderr


def test_empty_plan(call, agent) -> None:
    agent.answers["plan"] = []
    assert call("plan").exit_code == 0
    assert "Nothing to change" in call("plan").stdout


@pytest.mark.parametrize("output", ["table", "wide", "json"])
def test_plan_with_changes(call, agent, output: str) -> None:
    agent.answers["plan"] = [
        {"target": "routes", "action": "write", "key": "10.0.0.0/8", "row": "Route()"},
        {"target": "ipcache", "action": "delete", "key": "x", "row": ""},
    ]
    result = call("plan", "-o", output)
    assert result.exit_code == 3
    if output == "json":
        assert len(json.loads(result.stdout)) == 2
    else:
        assert "2 changes: 1 to delete, 1 to write." in result.stdout
        assert ("Route()" in result.stdout) is (output == "wide")


def test_metrics(call, agent) -> None:
    text = "# HELP a_total A\na_total 1.0\nb_total 2.0\n"
    agent.answers["metrics"] = text
    assert call("metrics").stdout == text
    assert call("metrics", "b_").stdout == "b_total 2.0\n"
    result = call("metrics", "nothing")
    assert result.exit_code == 1
    assert "No metric's name contains nothing." in result.stderr
