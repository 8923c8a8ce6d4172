"""Connections: what belongs to one, what it is worth, and when a verdict is reached again."""

import time
from dataclasses import replace

import pytest
from datapath import (
    EGRESS,
    ENFORCE_EGRESS,
    ENFORCE_INGRESS,
    EVENT_TRACE,
    INGRESS,
    POINT,
    REDIRECT,
    SHOT,
    TCX_NEXT,
    Datapath,
)  # fmt: skip
from record import (
    A_ID,
    A_IDENTITY,
    B_IDENTITY,
    B_IFINDEX,
    Build,
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
from test_policy import enforce, rule

from fimbria.model import rows

TCP, UDP = 6, 17
SECOND = 10**9
OPENED_EGRESS, SEEN_REPLY, FIN_FORWARD, FIN_REPLY, RST = 1, 2, 4, 8, 16
OUT, IN = ENFORCE_EGRESS, ENFORCE_INGRESS


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


def flow(w: Wire, proto: int = TCP, sport: int = 40000, dport: int = 80) -> rows.CtKey:
    """The connection that a opens to b, as a sees it."""
    return rows.CtKey(w.packed("a"), w.packed("b"), sport, dport, proto, 0)


def entry(flags: int = OPENED_EGRESS, seconds: float = 100, endpoint: int = A_ID, epoch: int = 1,
          peer: int = B_IDENTITY, reported: int = 0) -> rows.CtEntry:  # fmt: skip
    expires = int(now() + seconds * SECOND)
    return rows.CtEntry(expires, reported or now(), endpoint, 900, epoch, peer, 0, 0, flags, 0, 0, bytes(16))


def denied_but(key: dict[str, int], **fields: int) -> Prepare:
    """Nothing is allowed any more, but a has this connection with b."""

    def prepare(dp: Datapath, w: Wire) -> None:
        enforce(a=OUT | IN)(dp, w)
        dp.put("conntrack", flow(w, **key), entry(**fields))

    return prepare


def expect(flags: int, seconds: int, proto: int = TCP, dport: int = 80, sport: int = 40000) -> Prepare:
    """a's entry has these flags and lives for about this long."""

    def look(dp: Datapath, w: Wire) -> None:
        found = dp.get("conntrack", flow(w, proto, sport, dport))
        assert found, dp.items("conntrack")
        assert found.flags == flags
        assert seconds - 3 < (found.expires - now()) / SECOND < seconds + 3

    return look


def gone(dp: Datapath, w: Wire) -> None:
    assert dp.get("conntrack", flow(w)) is None


def allow_then_deny(dp: Datapath, w: Wire) -> None:
    enforce(a=OUT | IN)(dp, w)
    dp.put("conntrack", flow(w), entry(epoch=0))


def without_epoch(dp: Datapath, w: Wire) -> None:
    """A new `runtime` map, which nobody has written yet, and a connection that was judged under such a one."""
    allow_then_deny(dp, w)
    dp.put("runtime", 0, rows.Runtime(0))


def revoked(dp: Datapath, w: Wire) -> None:
    """a may not send to b any more, nobody asks what comes in; b's answer arrives just after that was noticed."""
    enforce(a=OUT)(dp, w)
    dp.put("conntrack", flow(w), entry(epoch=0))
    assert send(dp, "from_pod", w.sent("b", syn(flags="A")))[0] == SHOT
    assert send(dp, "to_pod", reply_to_a("A")(w))[0] == SHOT
    dp.events()


def allowed_again(dp: Datapath, w: Wire) -> None:
    enforce(rule(B_IDENTITY, EGRESS, proto=TCP, port=80), a=OUT | IN)(dp, w)
    dp.put("conntrack", flow(w), entry(epoch=0))


def judged_under(epoch: int) -> Prepare:
    def look(dp: Datapath, w: Wire) -> None:
        assert dp.get("conntrack", flow(w)).epoch == epoch

    return look


def new_owner(dp: Datapath, w: Wire) -> None:
    """b's address now belongs to somebody else, whom the rules don't allow."""
    enforce(rule(B_IDENTITY, EGRESS), a=OUT)(dp, w)
    dp.put("conntrack", flow(w), entry())
    row = dp.get("endpoints", B_IFINDEX)
    dp.put("endpoints", B_IFINDEX, replace(row, identity=4444))


def only_ingress_from_b(dp: Datapath, w: Wire) -> None:
    enforce(rule(B_IDENTITY, INGRESS), a=OUT | IN)(dp, w)


def reply_to_a(flags: str = "SA") -> Build:
    return lambda w: w.routed("b", "a", syn(80, 40000, flags))


OPEN = ("from_pod", lambda w: w.sent("b", syn()))
ANSWER = ("to_pod", reply_to_a())
DONE = {"proto": TCP}
RECORDS = [
    Record("an attempt lives for a minute", OPEN[1], REDIRECT, then=expect(OPENED_EGRESS, 60)),
    Record("an answered connection lives for hours", reply_to_a(), TCX_NEXT, program="to_pod", before=[OPEN],
           then=expect(OPENED_EGRESS | SEEN_REPLY, 8 * 3600)),
    Record("a datagram lives for a minute", lambda w: w.sent("b", udp()), REDIRECT,
           then=expect(OPENED_EGRESS, 60, UDP, 53)),
    Record("an answered datagram for three", lambda w: w.routed("b", "a", udp(53, 40000)), TCX_NEXT, program="to_pod",
           before=[("from_pod", lambda w: w.sent("b", udp()))], then=expect(OPENED_EGRESS | SEEN_REPLY, 180, UDP, 53)),
    Record("one FIN keeps the connection", lambda w: w.sent("b", syn(flags="FA")), REDIRECT, before=[OPEN, ANSWER],
           then=expect(OPENED_EGRESS | SEEN_REPLY | FIN_FORWARD, 8 * 3600)),
    Record("both FINs close it", reply_to_a("FA"), TCX_NEXT, program="to_pod",
           before=[OPEN, ANSWER, ("from_pod", lambda w: w.sent("b", syn(flags="FA")))],
           then=expect(OPENED_EGRESS | SEEN_REPLY | FIN_FORWARD | FIN_REPLY, 10)),
    Record("a reset closes it", reply_to_a("R"), TCX_NEXT, program="to_pod", before=[OPEN, ANSWER],
           then=expect(OPENED_EGRESS | SEEN_REPLY | RST, 10)),
    Record("a reset opens nothing", lambda w: w.sent("b", syn(flags="R")), REDIRECT, then=gone),
    Record("an attempt after the close opens it anew", OPEN[1], REDIRECT,
           before=[OPEN, ANSWER, ("to_pod", reply_to_a("R"))], then=expect(OPENED_EGRESS, 60)),
    Record("data without an entry opens one", lambda w: w.sent("b", syn(flags="A")), REDIRECT,
           then=expect(OPENED_EGRESS, 60)),
    Record("a reply passes where nothing else may", reply_to_a(), TCX_NEXT, program="to_pod", rows=denied_but(DONE)),
    Record("going on passes where nothing else may", lambda w: w.sent("b", syn(flags="A")), REDIRECT,
           rows=denied_but(DONE)),
    Record("an attempt by the other side is no reply", reply_to_a("S"), SHOT, program="to_pod", rows=denied_but(DONE),
           drop="DROP_POLICY_DENIED"),
    Record("an expired entry is none", reply_to_a(), SHOT, program="to_pod", rows=denied_but(DONE, seconds=-1),
           drop="DROP_POLICY_DENIED"),
    Record("an entry of the address's former owner is none", reply_to_a(), SHOT, program="to_pod",
           rows=denied_but(DONE, endpoint=99), drop="DROP_POLICY_DENIED"),
    Record("another port is another connection", lambda w: w.routed("b", "a", syn(81, 40000, "SA")), SHOT,
           program="to_pod", rows=denied_but(DONE), drop="DROP_POLICY_DENIED"),
    Record("what is allowed no more is dropped under a new epoch", lambda w: w.sent("b", syn(flags="A")), SHOT,
           rows=allow_then_deny, drop="DROP_POLICY_DENIED", then=judged_under(0)),
    Record("its replies are dropped as well", reply_to_a("A"), SHOT, program="to_pod", rows=allow_then_deny,
           drop="DROP_POLICY_DENIED", then=judged_under(0)),
    Record("an answer that was on its way doesn't open it the other way", lambda w: w.sent("b", syn(flags="A")), SHOT,
           rows=revoked, drop="DROP_POLICY_DENIED", then=judged_under(0)),
    Record("nothing is taken for judged without an epoch", lambda w: w.sent("b", syn(flags="A")), SHOT,
           rows=without_epoch, drop="DROP_POLICY_DENIED"),
    Record("what still is allowed passes under a new epoch", lambda w: w.sent("b", syn(flags="A")), REDIRECT,
           rows=allowed_again, then=judged_under(1)),
    Record("a reply is judged by the opener's direction", reply_to_a("A"), TCX_NEXT, program="to_pod",
           rows=allowed_again, then=judged_under(1)),
    Record("another identity behind the address is judged", lambda w: w.sent("b", syn(flags="A")), SHOT, rows=new_owner,
           drop="DROP_POLICY_DENIED"),
    Record("replies to what came in pass", lambda w: w.sent("b", syn(80, 40000, "SA")), REDIRECT,
           rows=only_ingress_from_b, before=[("to_pod", lambda w: w.routed("b", "a", syn()))]),
    Record("an echo reply passes by its identifier", lambda w: w.routed("b", "a", w.echo_reply()), TCX_NEXT,
           program="to_pod", rows=enforce(rule(B_IDENTITY, EGRESS), a=OUT | IN),
           before=[("from_pod", lambda w: w.sent("b", w.echo()))]),
    Record("an echo reply with another identifier does not", lambda w: w.routed("b", "a", w.echo_reply(78)), SHOT,
           program="to_pod", rows=enforce(rule(B_IDENTITY, EGRESS), a=OUT | IN),
           before=[("from_pod", lambda w: w.sent("b", w.echo()))], drop="DROP_POLICY_DENIED"),
    Record("an echo request is no reply", lambda w: w.routed("b", "a", w.echo()), SHOT, program="to_pod",
           rows=enforce(rule(B_IDENTITY, EGRESS), a=OUT | IN),
           before=[("from_pod", lambda w: w.sent("b", w.echo()))], drop="DROP_POLICY_DENIED"),
    Record("an error about the connection passes", lambda w: w.routed("hop", "a", w.too_big(w.ip("a", "b") / syn())),
           TCX_NEXT, program="to_pod", rows=denied_but(DONE)),
    Record("an error about no connection is ICMP like other", lambda w: w.routed("hop", "a", w.too_big(
           w.ip("a", "b") / syn(sport=5))), SHOT, program="to_pod", rows=denied_but(DONE), drop="DROP_POLICY_DENIED"),
    Record("an error about an echo passes", lambda w: w.routed("hop", "a", w.time_exceeded(w.ip("a", "b") / w.echo())),
           TCX_NEXT, program="to_pod", rows=enforce(rule(B_IDENTITY, EGRESS), a=OUT | IN),
           before=[("from_pod", lambda w: w.sent("b", w.echo()))]),
    Record("a pod's error about what it got passes", lambda w: w.sent("b", w.unreachable(w.ip("b", "a") / udp())),
           REDIRECT, rows=only_ingress_from_b, before=[("to_pod", lambda w: w.routed("b", "a", udp()))]),
    Record("an error about a fragment is ICMP like other", lambda w: w.routed("hop", "a", w.too_big(
           w.ip("a", "b", frag=5) / syn())), SHOT, program="to_pod", rows=denied_but(DONE), families=(4,),
           drop="DROP_POLICY_DENIED"),
    Record("an error with half a header is ICMP like other", lambda w: w.routed("hop", "a", w.too_big(
           w.ip("a", "b", proto=6))), SHOT, program="to_pod", rows=denied_but(DONE), families=(4,),
           drop="DROP_POLICY_DENIED"),
    Record("a connection that goes on is not reported", lambda w: w.sent("b", syn(flags="A")), REDIRECT,
           before=[OPEN], events=[]),
    Record("its first FIN is", lambda w: w.sent("b", syn(flags="FA")), REDIRECT, before=[OPEN],
           events=[(EVENT_TRACE, POINT["TRACE_TO_ENDPOINT"])]),
    Record("the second is not", lambda w: w.sent("b", syn(flags="FA")), REDIRECT,
           before=[OPEN, ("from_pod", lambda w: w.sent("b", syn(flags="FA")))], events=[]),
]  # fmt: skip


@pytest.mark.parametrize(("record", "family"), cases(RECORDS), ids=case_id)
def test_record(dp: Datapath, record: Record, family: int) -> None:
    check(dp, record, family)


def test_connection_is_reported_again_after_the_interval(dp: Datapath) -> None:
    w = Wire(4)
    dp.clear()
    base_rows(dp)
    dp.put("conntrack", flow(w), entry(reported=now() - 6 * SECOND))
    send(dp, "from_pod", w.sent("b", syn(flags="A")))
    # b's own entry is new, and says so.
    assert [e.endpoint for e in dp.events()] == [12]
    dp.put("conntrack", flow(w), entry(reported=now() - 6 * SECOND))
    send(dp, "to_pod", w.routed("b", "a", syn(80, 40000, "A")))
    assert [(e.endpoint, e.ct_state) for e in dp.events()] == [(A_ID, 3)]


def test_both_pods_have_their_own_entry(dp: Datapath) -> None:
    w = Wire(6)
    dp.clear()
    base_rows(dp)
    send(dp, "from_pod", w.sent("b", syn()))
    found = {(k.local, e.endpoint, e.peer, e.flags) for k, e in dp.items("conntrack")}
    assert found == {(w.packed("a"), 11, B_IDENTITY, OPENED_EGRESS), (w.packed("b"), 12, A_IDENTITY, 0)}
