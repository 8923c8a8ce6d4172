"""Who may talk to whom: the rules as the kernel applies them."""

import struct

import pytest
from datapath import (
    CIDR_EGRESS,
    CIDR_INGRESS,
    EGRESS,
    ENFORCE_EGRESS,
    ENFORCE_INGRESS,
    EVENT_DROP,
    EVENT_TRACE,
    EVENT_VERDICT,
    INGRESS,
    POINT,
    READY,
    REDIRECT,
    SHOT,
    TCX_NEXT,
    WORLD,
    Datapath,
    prefix,
)  # fmt: skip
from record import (
    A_IDENTITY,
    B_IDENTITY,
    C_IDENTITY,
    Prepare,
    Record,
    Wire,
    base_rows,
    case_id,
    cases,
    check,
    send,
    syn,
    udp,
)  # fmt: skip

from fimbria.model import rows

ALLOW, DENY = 1, 2
ANY_PEER = 1
CIDR_IDENTITY = (1 << 24) | 5
TCP, UDP = 6, 17


def rule(peer: int, direction: int, verdict: int = ALLOW, proto: int = 0, port: int | None = None, number: int = 900,
         bits: int = 16, flags: int = 0) -> tuple[rows.PolicyKey, rows.PolicyEntry]:  # fmt: skip
    """One entry. No protocol: any; no port: any; `bits` of the port count."""
    length = 40 if not proto else 48 if port is None else 48 + bits
    return rows.PolicyKey(length, peer, direction, proto, port or 0), rows.PolicyEntry(verdict, flags, number)


def enforce(*rules: tuple[rows.PolicyKey, rows.PolicyEntry], a: int = 0, b: int = 0, cidr: str = "") -> Prepare:
    """Pods a (set 11) and b (set 12) with flags `a` and `b`; all have the same rules. `cidr`: a prefix that has
    CIDR_IDENTITY, as a name whose address it covers."""

    def prepare(dp: Datapath, w: Wire) -> None:
        base_rows(dp, READY | a, READY | b)
        for number in (11, 12):
            dp.policy_set(number, dict(rules))
        if cidr:
            dp.put("cidrs", prefix(w.cidr(cidr)), rows.Cidr(CIDR_IDENTITY))

    return prepare


def icmp_rule(dp: Datapath, w: Wire) -> None:
    enforce(rule(B_IDENTITY, EGRESS, proto=w.icmp, port=w.echo_type << 8), a=ENFORCE_EGRESS)(dp, w)


def icmp_other_type(dp: Datapath, w: Wire) -> None:
    enforce(rule(B_IDENTITY, EGRESS, proto=w.icmp, port=3 << 8), a=ENFORCE_EGRESS)(dp, w)


def set_missing(dp: Datapath, w: Wire) -> None:
    enforce(rule(0, EGRESS), a=ENFORCE_EGRESS)(dp, w)
    assert dp.maps["policy_sets"].delete(struct.pack("=I", 11))


def unknown(*identities: int, rows: Prepare) -> Prepare:
    """`rows`, with the compiler not having seen these identities yet."""

    def prepare(dp: Datapath, w: Wire) -> None:
        rows(dp, w)
        for identity in identities:
            dp.forget(identity)

    return prepare


def forgotten_in_a_new_epoch(dp: Datapath, w: Wire) -> None:
    dp.forget(B_IDENTITY)
    assert send(dp, "from_pod", w.sent("b", syn(flags="A")))[0] == REDIRECT
    dp.put("runtime", 0, rows.Runtime(2))
    assert send(dp, "from_pod", w.sent("b", syn(flags="A")))[0] == SHOT
    dp.know(B_IDENTITY)
    assert send(dp, "from_pod", w.sent("b", syn(flags="A")))[0] == REDIRECT


def by_packet(w: Wire):  # type: ignore[no-untyped-def]
    return w.sent("b", syn())


TO_B = by_packet
OUT, IN = ENFORCE_EGRESS, ENFORCE_INGRESS
RECORDS = [
    Record("no policy allows", TO_B, REDIRECT),
    Record("an empty policy denies egress", TO_B, SHOT, rows=enforce(a=OUT), drop="DROP_POLICY_DENIED",
           events=[(EVENT_DROP, 133)]),
    Record("an empty policy denies ingress", TO_B, SHOT, rows=enforce(b=IN), drop="DROP_POLICY_DENIED"),
    Record("egress policy says nothing about ingress", TO_B, REDIRECT, rows=enforce(a=IN, b=OUT)),
    Record("a set that is missing denies", TO_B, SHOT, rows=set_missing, drop="DROP_POLICY_DENIED"),
    Record("an identity is allowed on all ports", TO_B, REDIRECT, rows=enforce(rule(B_IDENTITY, EGRESS), a=OUT)),
    Record("another identity is not", TO_B, SHOT, rows=enforce(rule(C_IDENTITY, EGRESS), a=OUT),
           drop="DROP_POLICY_DENIED"),
    Record("a rule holds in its direction only", TO_B, SHOT, rows=enforce(rule(B_IDENTITY, INGRESS), a=OUT),
           drop="DROP_POLICY_DENIED"),
    Record("any peer is allowed", TO_B, REDIRECT, rows=enforce(rule(0, EGRESS), a=OUT)),
    Record("the port is allowed", TO_B, REDIRECT, rows=enforce(rule(B_IDENTITY, EGRESS, proto=TCP, port=80), a=OUT)),
    Record("another port is not", TO_B, SHOT, rows=enforce(rule(B_IDENTITY, EGRESS, proto=TCP, port=81), a=OUT),
           drop="DROP_POLICY_DENIED"),
    Record("another protocol is not", TO_B, SHOT, rows=enforce(rule(B_IDENTITY, EGRESS, proto=UDP, port=80), a=OUT),
           drop="DROP_POLICY_DENIED"),
    Record("any port of the protocol is allowed", TO_B, REDIRECT,
           rows=enforce(rule(B_IDENTITY, EGRESS, proto=TCP), a=OUT)),
    Record("a port range by prefix is allowed", TO_B, REDIRECT,
           rows=enforce(rule(B_IDENTITY, EGRESS, proto=TCP, port=80, bits=12), a=OUT)),
    Record("a port past the range is not", lambda w: w.sent("b", syn(dport=96)), SHOT,
           rows=enforce(rule(B_IDENTITY, EGRESS, proto=TCP, port=80, bits=12), a=OUT), drop="DROP_POLICY_DENIED"),
    Record("ingress is judged by the sender's identity", TO_B, REDIRECT,
           rows=enforce(rule(A_IDENTITY, INGRESS, proto=TCP, port=80), b=IN)),
    Record("a deny of any peer wins over an allow of the peer", TO_B, SHOT,
           rows=enforce(rule(B_IDENTITY, EGRESS, proto=TCP, port=80), rule(0, EGRESS, DENY), a=OUT),
           drop="DROP_POLICY_DENY"),
    Record("a deny of the peer wins over an allow of any", TO_B, SHOT,
           rows=enforce(rule(0, EGRESS), rule(B_IDENTITY, EGRESS, DENY, proto=TCP), a=OUT), drop="DROP_POLICY_DENY"),
    Record("a deny of another port does not matter", TO_B, REDIRECT,
           rows=enforce(rule(B_IDENTITY, EGRESS), rule(0, EGRESS, DENY, proto=TCP, port=81), a=OUT)),
    Record("a CIDR rule allows the world", lambda w: w.sent("world", syn()), TCX_NEXT,
           rows=enforce(rule(CIDR_IDENTITY, EGRESS), a=OUT | CIDR_EGRESS, cidr="world")),
    Record("a CIDR rule is not asked without the flag", lambda w: w.sent("world", syn()), SHOT,
           rows=enforce(rule(CIDR_IDENTITY, EGRESS), a=OUT, cidr="world"), drop="DROP_POLICY_DENIED"),
    Record("a CIDR deny wins over an allow of the world", lambda w: w.sent("world", syn()), SHOT,
           rows=enforce(rule(CIDR_IDENTITY, EGRESS, DENY), rule(WORLD, EGRESS), a=OUT | CIDR_EGRESS, cidr="world"),
           drop="DROP_POLICY_DENY"),
    Record("a CIDR rule for the world does not hold for pods", TO_B, SHOT,
           rows=enforce(rule(CIDR_IDENTITY, EGRESS), a=OUT | CIDR_EGRESS, cidr="b"), drop="DROP_POLICY_DENIED"),
    Record("an ipBlock holds for pods too", TO_B, REDIRECT,
           rows=enforce(rule(CIDR_IDENTITY, EGRESS, flags=ANY_PEER), a=OUT | CIDR_EGRESS, cidr="b")),
    Record("where it denies the world it still allows pods", TO_B, REDIRECT,
           rows=enforce(rule(CIDR_IDENTITY, EGRESS, DENY, flags=ANY_PEER), a=OUT | CIDR_EGRESS, cidr="b")),
    Record("and denies the world", lambda w: w.sent("world", syn()), SHOT,
           rows=enforce(rule(CIDR_IDENTITY, EGRESS, DENY, flags=ANY_PEER), a=OUT | CIDR_EGRESS, cidr="world"),
           drop="DROP_POLICY_DENY"),
    Record("an ipBlock holds for ingress", TO_B, REDIRECT,
           rows=enforce(rule(CIDR_IDENTITY, INGRESS, flags=ANY_PEER), b=IN | CIDR_INGRESS, cidr="a")),
    Record("the world is an identity", lambda w: w.sent("world", syn()), TCX_NEXT,
           rows=enforce(rule(WORLD, EGRESS), a=OUT)),
    Record("the own node is subject to egress policy", lambda w: w.sent("node", syn()), SHOT, rows=enforce(a=OUT),
           drop="DROP_POLICY_DENIED"),
    Record("the own node may always reach its pods", lambda w: w.routed("node", "a", syn()), TCX_NEXT, program="to_pod",
           rows=enforce(a=IN)),
    Record("another node may not", lambda w: w.routed("other", "a", syn()), SHOT, program="to_pod", rows=enforce(a=IN),
           drop="DROP_POLICY_DENIED"),
    Record("the mark tells the source through the stack", lambda w: w.routed("world", "a", syn()), TCX_NEXT,
           program="to_pod", rows=enforce(rule(C_IDENTITY, INGRESS), a=IN), mark_in=C_IDENTITY << 8 | 0xF1, mark=0),
    Record("without the mark it is the world's", lambda w: w.routed("world", "a", syn()), SHOT,
           program="to_pod", rows=enforce(rule(C_IDENTITY, INGRESS), a=IN), drop="DROP_POLICY_DENIED"),
    Record("the ICMP type is allowed", lambda w: w.sent("b", w.echo()), REDIRECT, rows=icmp_rule),
    Record("another ICMP type is not", lambda w: w.sent("b", w.echo()), SHOT, rows=icmp_other_type,
           drop="DROP_POLICY_DENIED"),
    Record("an identity that isn't compiled yet is not reached", TO_B, SHOT,
           rows=unknown(B_IDENTITY, rows=enforce(rule(0, EGRESS), a=OUT)), drop="DROP_INVALID_IDENTITY"),
    Record("nor does it reach anybody", TO_B, SHOT,
           rows=unknown(A_IDENTITY, rows=enforce(rule(0, INGRESS), b=IN)), drop="DROP_INVALID_IDENTITY"),
    Record("not even by a rule that names it", TO_B, SHOT,
           rows=unknown(B_IDENTITY, rows=enforce(rule(B_IDENTITY, EGRESS), a=OUT)), drop="DROP_INVALID_IDENTITY"),
    Record("who doesn't enforce doesn't ask", TO_B, REDIRECT,
           rows=unknown(A_IDENTITY, B_IDENTITY, rows=enforce(a=IN, b=OUT))),
    Record("nor is one's own identity asked about", TO_B, REDIRECT,
           rows=unknown(A_IDENTITY, rows=enforce(rule(B_IDENTITY, EGRESS), a=OUT))),
    Record("an unknown identity in the mark", lambda w: w.routed("world", "a", syn()), SHOT, program="to_pod",
           rows=unknown(C_IDENTITY, rows=enforce(rule(0, INGRESS), a=IN)), mark_in=C_IDENTITY << 8 | 0xF1,
           drop="DROP_INVALID_IDENTITY"),
    Record("who was let in is asked about again in a new epoch", lambda w: w.sent("b", syn(flags="A")), REDIRECT,
           rows=enforce(rule(B_IDENTITY, EGRESS), a=OUT), before=[("from_pod", TO_B)], then=forgotten_in_a_new_epoch),
    Record("an allowed connection is reported with its verdict", TO_B, REDIRECT,
           rows=enforce(rule(B_IDENTITY, EGRESS, number=321), a=OUT),
           events=[(EVENT_VERDICT, ALLOW), (EVENT_TRACE, POINT["TRACE_TO_ENDPOINT"])]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(RECORDS), ids=case_id)
def test_record(dp: Datapath, record: Record, family: int) -> None:
    check(dp, record, family)


@pytest.mark.parametrize(("verdict", "number"), [(ALLOW, 321), (DENY, 322)])
def test_events_name_the_rule(dp: Datapath, verdict: int, number: int) -> None:
    w = Wire(4)
    dp.clear()
    enforce(rule(B_IDENTITY, EGRESS, verdict, number=number), a=OUT)(dp, w)
    send(dp, "from_pod", w.sent("b", udp()))
    event = dp.events()[0]
    assert (event.rule, event.endpoint, event.source, event.destination) == (number, 11, A_IDENTITY, B_IDENTITY)
    assert (event.saddr, event.daddr, event.sport, event.dport) == (w.packed("a"), w.packed("b"), 40000, 53)
