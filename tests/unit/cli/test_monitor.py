"""Flows: filters, forms, and an observer that goes away."""

import itertools
import json

import pytest

from fimbria.cli import monitor
from fimbria.cli.local import Local, Unreachable

FLOW = {
    "time": "2026-01-02T03:04:05.678901Z",
    "verdict": "DROPPED",
    "node_name": "node1",
    "event_type": "drop",
    "traffic_direction": "INGRESS",
    "source": {"identity": 300, "labels": ["k8s:app=other"], "namespace": "shop", "pod_name": "other"},
    "destination": {"identity": 301, "labels": [], "namespace": "shop", "pod_name": "web"},
    "IP": {"source": "10.0.0.1", "destination": "10.0.0.2", "ipVersion": "IPv4"},
    "l4": {"TCP": {"source_port": 4242, "destination_port": 80, "flags": ["SYN"]}},
    "is_reply": False,
    "drop_reason_desc": "POLICY_DENIED",
    "Summary": "TCP Flags: SYN",
    "ingress_denied_by": [{"kind": "NetworkPolicy", "namespace": "shop", "name": "only", "path": "default deny"}],
}


def lines(*flows: object) -> str:
    return "".join(json.dumps(f) + "\n" for f in flows)


def test_compact_line_has_ends_reason_and_rule(call, observer) -> None:
    observer.answers["flows"] = lines(FLOW)
    result = call("monitor", "--no-follow")
    assert result.exit_code == 0
    assert " ".join(result.stdout.split()) == (
        "03:04:05.678 dropped drop shop/other:4242 -> shop/web:80 TCP Flags: SYN POLICY_DENIED; "
        "no rule allows it (ingress default deny by NetworkPolicy shop/only)"
    )


def test_reply_and_allowed() -> None:
    allowed = FLOW | {"verdict": "FORWARDED", "is_reply": True}
    assert "-> (reply)" in monitor.compact(allowed)
    assert "forwarded" in monitor.compact(allowed)


def test_json_forms(call, observer) -> None:
    observer.answers["flows"] = lines(FLOW, FLOW)
    assert [json.loads(ln) for ln in call("monitor", "--no-follow", "-o", "json").stdout.splitlines()] == [FLOW, FLOW]
    wrapped = json.loads(call("monitor", "--no-follow", "-o", "jsonpb").stdout.splitlines()[0])
    assert wrapped == {"flow": FLOW, "node_name": "node1", "time": FLOW["time"]}


@pytest.mark.parametrize(
    ("options", "query"),
    [
        ((), {"last": "20"}),
        (("--last", "5"), {"last": "5"}),
        (("--pod", "a/b", "--pod", "c"), {"pod": "a/b,c", "last": "20"}),
        (("-n", "shop", "--to-port", "80"), {"namespace": "shop", "to-port": "80", "last": "20"}),
        (("--verdict", "dropped", "-t", "drop"), {"verdict": "dropped", "type": "drop", "last": "20"}),
        (
            ("--direction", "egress", "--from-label", "app=x"),
            {"direction": "egress", "from-label": "app=x", "last": "20"},
        ),
        (
            ("--identity", "world", "--policy", "a/b", "--reason", "x"),
            {"identity": "world", "policy": "a/b", "reason": "x", "last": "20"},
        ),
    ],
)
def test_filters_become_the_query(call, observer, options: tuple[str, ...], query: dict[str, str]) -> None:
    observer.answers["flows"] = ""
    assert call("monitor", "--no-follow", *options).exit_code == 0
    assert observer.asked[-1] == ("/v1/flows", query)


def test_every_filter_is_one_that_the_observer_has() -> None:
    from fimbria.observe.filters import build

    values = {"--ip": "10.0.0.1", "--identity": "1", "--port": "1"}
    for option, _, _ in monitor.FILTERS:
        value = next((v for name, v in values.items() if option.endswith(name[1:])), "x")
        build({option.removeprefix("--"): value})
    build(
        {
            "verdict": ",".join(monitor.VERDICTS),
            "type": ",".join(monitor.TYPES),
            "namespace": "x",
            "direction": "egress",
        }
    )


def test_bad_filters(call, observer) -> None:
    observer.answers["flows"] = (400, {"error": "'x' is no IP address or network"})
    result = call("monitor", "--ip", "x")
    assert result.exit_code == 1
    assert "'x' is no IP address or network." in result.stderr
    assert call("monitor", "--verdict", "maybe").exit_code == 2


def test_no_observer(call) -> None:
    result = call("monitor")
    assert result.exit_code == 2
    assert "No observer runs on this node" in result.stderr


def test_alias(call, observer) -> None:
    observer.answers["flows"] = lines(FLOW)
    assert call("observe", "--no-follow").exit_code == 0


def at(second: int) -> dict[str, object]:
    return FLOW | {"time": f"2999-01-01T00:00:{second:02}.000000Z"}


def test_reconnects_and_shows_nothing_twice(observer, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(monitor, "RETRY", 0.01)
    answers = iter([lines(at(1), at(2)), (503, {"error": "starting"}), lines(at(1), at(2), at(3))])
    observer.answers["flows"] = lambda: next(answers)
    local = Local("observer")
    found = monitor.follow_flows(local, {"pod": "x"}, 7)
    first = list(itertools.islice(found, 2))
    assert observer.asked[0][1] == {"pod": "x", "last": "7", "follow": "1"}
    assert [f["time"][17:19] for f in first] == ["01", "02"]
    with pytest.raises(Exception, match="Starting"):
        next(found)


def test_waits_for_its_return(observer, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(monitor, "RETRY", 0.01)
    local = Local("observer")
    asked: list[str] = []
    answers = [iter([at(1), at(2)]), Unreachable("gone"), Unreachable("gone"), iter([at(1), at(2), at(3)])]

    def answer(*_: str, **query: str):
        asked.append(query["last"])
        found = answers.pop(0)
        if isinstance(found, Unreachable):
            raise found
        return found

    monkeypatch.setattr(local, "lines", answer)
    found = [f["time"][17:19] for f in itertools.islice(monitor.follow_flows(local, {}, 0), 3)]
    assert found == ["01", "02", "03"]
    assert asked == ["0", "4095", "4095", "4095"]
    said = capsys.readouterr().err.splitlines()
    assert said == ["-- the observer went away; waiting for it", "-- the observer is back"]
