"""From a datapath event to a flow: the JSON form of Hubble's `flow.Flow`, so that users' tools know it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final, Protocol

from fimbria.model.address import is_v4, unpack
from fimbria.model.rows import NO_ADDR, Event
from fimbria.observe.names import drop_reason_name, enum_names

Json = dict[str, Any]
DROP, TRACE, VERDICT = 1, 2, 3
INGRESS, EGRESS = 0, 1
POLICY_DENIED, POLICY_DENY = 133, 181
ALLOWED: Final = 1
REPLY: Final = 3
DEFAULT_DENY: Final = "default deny"
PROTOCOLS: Final = {1: "ICMPv4", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
_FLAGS: Final = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")


class Names(Protocol):
    """What the agent knows behind numbers and addresses; None or empty for what it doesn't."""

    def addr(self, addr: bytes) -> Json | None:
        """Who has an address: {kind, namespace, name, node}."""
        ...

    def identity(self, number: int) -> list[str]:
        """Labels of an identity."""
        ...

    def rule(self, number: int) -> Json | None:
        """Where a rule is written: {kind, namespace, name, path}."""
        ...

    def service(self, number: int) -> Json | None:
        """Which service: {namespace, name, port}."""
        ...

    def endpoint(self, number: int) -> Json | None:
        """A local endpoint: {namespace, name, interface, enforced_by{ingress, egress}}."""
        ...


@dataclass(frozen=True, slots=True)
class Clock:
    """Turns ktime nanoseconds into wall-clock time. `offset` is wall minus monotonic, in nanoseconds."""

    offset: int

    def text(self, ktime: int) -> str:
        """RFC 3339 with microseconds."""
        seconds = (ktime + self.offset) / 1e9
        return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@dataclass(slots=True)
class FlowBuilder:
    """Builds flows of one node."""

    node: str
    clock: Clock
    names: Names
    _points: Mapping[int, str] = field(default_factory=lambda: enum_names("trace_point", "TRACE_"))

    def flow(self, e: Event) -> Json:
        """The flow of one event."""
        dropped = e.type == DROP or (e.type == VERDICT and e.reason != ALLOWED)
        body: Json = {
            "time": self.clock.text(e.time),
            "verdict": "DROPPED" if dropped else "FORWARDED",
            "node_name": self.node,
            "Type": "L3_L4",
            "event_type": {DROP: "drop", TRACE: "trace", VERDICT: "policy-verdict"}.get(e.type, str(e.type)),
            "traffic_direction": "EGRESS" if e.direction == EGRESS else "INGRESS",
            "source": self._peer(e.source, e.saddr),
            "destination": self._peer(e.destination, e.daddr),
            "is_reply": e.ct_state == REPLY,
            "length": e.packet_len,
        }
        if e.saddr != NO_ADDR:
            family = "IPv4" if is_v4(e.saddr) else "IPv6"
            body["IP"] = {"source": unpack(e.saddr), "destination": unpack(e.daddr), "ipVersion": family}
            body["l4"] = self._l4(e)
        if e.type == DROP:
            body["drop_reason_desc"] = drop_reason_name(e.reason)
            body["drop_reason"] = e.reason
        elif e.type == TRACE:
            body["trace_observation_point"] = self._points.get(e.reason, str(e.reason))
        service = self.names.service(e.service) if e.service else None
        if service:
            body["destination_service" if e.direction == EGRESS else "source_service"] = service
        self._policy(e, body, dropped)
        body["Summary"] = summary(body)
        return body

    def _policy(self, e: Event, body: Json, dropped: bool) -> None:
        """The rule behind a verdict; for a drop by default, the policies that make it the default."""
        if e.ct_state == REPLY:
            return  # allowed by its connection, whose rule stands in the flow that opened it
        direction = "egress" if e.direction == EGRESS else "ingress"
        rule = self.names.rule(e.rule) if e.rule else None
        if rule:
            body[f"{direction}_{'denied' if dropped else 'allowed'}_by"] = [rule]
        elif dropped and e.type in (DROP, VERDICT) and e.reason in (POLICY_DENIED, POLICY_DENY, 2):
            endpoint = self.names.endpoint(e.endpoint) or {}
            default = endpoint.get("enforced_by", {}).get(direction, [])
            if default:
                body[f"{direction}_denied_by"] = [_policy_name(text) for text in default]

    def _peer(self, identity: int, addr: bytes) -> Json:
        peer: Json = {"identity": identity, "labels": self.names.identity(identity)}
        who = self.names.addr(addr) if addr != NO_ADDR else None
        if who and who["kind"] == "pod":
            peer |= {"namespace": who["namespace"], "pod_name": who["name"]}
        elif who:
            peer["node_name"] = who["name"]
        return peer

    @staticmethod
    def _l4(e: Event) -> Json:
        name = PROTOCOLS.get(e.proto, f"protocol {e.proto}")
        if e.proto in (1, 58):
            return {name: {"type": e.sport, "code": e.dport}}
        ports: Json = {"source_port": e.sport, "destination_port": e.dport}
        if e.proto == 6:
            ports["flags"] = [flag for bit, flag in enumerate(_FLAGS) if e.tcp_flags >> bit & 1]
        return {name: ports}


def _policy_name(text: str) -> Json:
    kind, _, rest = text.partition(" ")
    namespace, slash, name = rest.partition("/")
    return {
        "kind": kind,
        "namespace": namespace if slash else "",
        "name": name if slash else rest,
        "path": DEFAULT_DENY,
    }


def summary(flow: Json) -> str:
    """One line for people."""
    name, ports = next(iter(flow.get("l4", {"?": {}}).items()))
    flags = ", ".join(ports.get("flags", ()))
    if "type" in ports:
        return f"{name} type {ports['type']} code {ports['code']}"
    return f"{name} Flags: {flags}" if flags else name


def end(flow: Json, side: str) -> str:
    """`namespace/pod:port`, a node, or an address with the identity's name."""
    peer, ip = flow[side], flow.get("IP", {}).get(side, "?")
    ports: Json = next(iter(flow.get("l4", {}).values()), {})
    port = ports.get(f"{side}_port")
    if peer.get("pod_name"):
        who = f"{peer['namespace']}/{peer['pod_name']}"
    else:
        label = peer["labels"][0] if peer["labels"] else f"identity {peer['identity']}"
        who = f"{ip} ({label.removeprefix('reserved:')})"
    return f"{who}:{port}" if port else who


def reason(flow: Json) -> str:
    """Why: the drop's reason with the rule behind it, or the rule that allowed."""
    parts = [flow["drop_reason_desc"]] if "drop_reason_desc" in flow else []
    for direction in ("ingress", "egress"):
        for word in ("denied", "allowed"):
            rules = flow.get(f"{direction}_{word}_by", ())
            default = [_policy_text(r) for r in rules if r["path"] == DEFAULT_DENY]
            if default:
                more = f" and {len(default) - 1} more" if len(default) > 1 else ""
                parts.append(f"no rule allows it ({direction} default deny by {default[0]}{more})")
            parts += [f"{word} by {_policy_text(r)} ({r['path']})" for r in rules if r["path"] != DEFAULT_DENY]
    return "; ".join(parts) or flow.get("trace_observation_point", "")


def _policy_text(rule: Json) -> str:
    name = f"{rule['namespace']}/{rule['name']}" if rule["namespace"] else rule["name"]
    return f"{rule['kind']} {name}"
