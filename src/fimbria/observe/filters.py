"""Which flows a reader wants to see. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Mapping
from typing import Any, Final

from fimbria.model.identity import Reserved

Json = dict[str, Any]
Test = Callable[[Json], bool]
_RULES: Final = ("ingress_denied_by", "ingress_allowed_by", "egress_denied_by", "egress_allowed_by")


class FilterError(ValueError):
    """A filter that can't be understood; the text names it."""


def build(wanted: Mapping[str, str]) -> Test:
    """All given filters must match; a filter with several values (comma separated) matches any of them.

    Raises FilterError naming an unknown filter or a value that can't be used.
    """
    tests: list[Test] = []
    for name, text in wanted.items():
        maker = _MAKERS.get(name)
        if maker is None:
            raise FilterError(f"there is no filter {name!r}; there are {', '.join(sorted(_MAKERS))}")
        values = [v.strip() for v in text.split(",") if v.strip()]
        if values:
            tests.append(_any([maker(v) for v in values]))
    return lambda flow: all(test(flow) for test in tests)


def _any(tests: list[Test]) -> Test:
    return lambda flow: any(test(flow) for test in tests)


def _sides(test: Callable[[Json, str], bool]) -> Test:
    return lambda flow: test(flow, "source") or test(flow, "destination")


def _pod(value: str) -> Callable[[Json, str], bool]:
    """`pod`, `namespace/pod`, or `namespace/` for all pods of a namespace; a name matches as a prefix."""
    namespace, slash, name = value.rpartition("/")

    def test(flow: Json, side: str) -> bool:
        peer = flow[side]
        return (not slash or peer.get("namespace", "") == namespace) and bool(
            peer.get("pod_name") and str(peer["pod_name"]).startswith(name)
        )

    return test


def _ip(value: str) -> Callable[[Json, str], bool]:
    try:
        network = ipaddress.ip_network(value, strict=False)
    except ValueError:
        raise FilterError(f"{value!r} is no IP address or network") from None
    return lambda flow, side: bool(flow.get("IP")) and ipaddress.ip_address(flow["IP"][side]) in network


def _number(value: str, what: str) -> int:
    if not value.isdecimal():
        raise FilterError(f"{what} {value!r} is no number")
    return int(value)


def _port(value: str) -> Callable[[Json, str], bool]:
    number = _number(value, "port")
    return lambda flow, side: any(p.get(f"{side}_port") == number for p in flow.get("l4", {}).values())


def _label(value: str) -> Callable[[Json, str], bool]:
    return lambda flow, side: any(value in (lb, lb.partition(":")[2]) for lb in flow[side]["labels"])


def _identity(value: str) -> Callable[[Json, str], bool]:
    """A number, or the name of a fixed one such as `world`."""
    known = Reserved.__members__.get(value.upper().replace("-", "_"))
    number = known.value if known is not None else _number(value, "identity")
    return lambda flow, side: bool(flow[side]["identity"] == number)


def _field(name: str, value: str) -> Test:
    wanted = value.upper()
    return lambda flow: str(flow.get(name, "")).upper() == wanted


def _policy(value: str) -> Test:
    """Flows that a rule of this policy (`name` or `namespace/name`) allowed or denied."""
    namespace, slash, name = value.rpartition("/")

    def test(flow: Json) -> bool:
        rules = [r for key in _RULES for r in flow.get(key, ())]
        return any(r["name"] == name and (not slash or r["namespace"] == namespace) for r in rules)

    return test


def _protocol(value: str) -> Test:
    wanted = value.upper()
    return lambda flow: any(p.upper().startswith(wanted) for p in flow.get("l4", {}))


def _one(side: str, maker: Callable[[str], Callable[[Json, str], bool]]) -> Callable[[str], Test]:
    def make(value: str) -> Test:
        test = maker(value)
        return lambda flow: test(flow, side)

    return make


def _both(maker: Callable[[str], Callable[[Json, str], bool]]) -> Callable[[str], Test]:
    return lambda value: _sides(maker(value))


_MAKERS: Final[dict[str, Callable[[str], Test]]] = {
    "pod": _both(_pod), "from-pod": _one("source", _pod), "to-pod": _one("destination", _pod),
    "ip": _both(_ip), "from-ip": _one("source", _ip), "to-ip": _one("destination", _ip),
    "port": _both(_port), "from-port": _one("source", _port), "to-port": _one("destination", _port),
    "label": _both(_label), "from-label": _one("source", _label), "to-label": _one("destination", _label),
    "identity": _both(_identity),
    "namespace": _both(lambda v: _pod(v + "/")),
    "verdict": lambda v: _field("verdict", v),
    "type": lambda v: _field("event_type", v),
    "reason": lambda v: _field("drop_reason_desc", v),
    "direction": lambda v: _field("traffic_direction", v),
    "protocol": _protocol,
    "policy": _policy,
}  # fmt: skip
