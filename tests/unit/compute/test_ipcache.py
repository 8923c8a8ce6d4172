"""Who owns an address, against a reference that looks at every claim each time."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fimbria.compute.ipcache import REMOTE_NODE, IpcacheCompute
from fimbria.model.address import Prefix, pack
from fimbria.model.endpoint import LocalEndpoint, RemoteEndpoint
from fimbria.model.identity import NOBODY
from fimbria.model.node import Node
from fimbria.model.rows import NO_ADDR, PrefixKey, Remote

OWN, OTHER = pack("172.31.1.10"), pack("172.31.2.10")
ADDRS = [pack(f"10.0.0.{n}") for n in range(3)]
KEYS = [PrefixKey(128, a) for a in ADDRS]


def ipcache() -> IpcacheCompute:
    made = IpcacheCompute("own", overlay=True)
    made.set_node("own", Node("own", (OWN,), (), (Prefix.parse("10.0.0.0/24"),)))
    return made


def remote(
    identity: int, addrs: tuple[bytes, ...], created: str, node: bytes = OTHER, writer: str = ""
) -> RemoteEndpoint:
    return RemoteEndpoint(identity, addrs, node, (), created, writer)


def local(addr: bytes) -> LocalEndpoint:
    return LocalEndpoint(1, "c", "eth0", "n", "", "ns", "pod", "", "fim0", 5, bytes(6), bytes(6), addr)


def test_a_claim_that_goes_gives_way_to_the_next() -> None:
    cache = ipcache()
    cache.set_remote(("a", "old"), remote(300, (ADDRS[0],), "2026-01-01T00:00:00Z"))
    cache.set_remote(("a", "young"), remote(301, (ADDRS[0],), "2026-01-02T00:00:00Z"))
    cache.set_local(1, local(ADDRS[0]), 302)
    owners = []
    for remove in (
        lambda: cache.set_local(1, None, 0),
        lambda: cache.set_remote(("a", "young"), None),
        lambda: cache.set_remote(("a", "old"), None),
    ):
        row = cache.get(KEYS[0])
        owners.append(row.identity if row else None)
        assert remove() == {KEYS[0]}
    assert owners == [302, 301, 300]
    assert cache.get(KEYS[0]) is None


def test_the_same_report_again_changes_nothing() -> None:
    cache = ipcache()
    report = remote(300, (ADDRS[0], ADDRS[1]), "")
    assert cache.set_remote(("a", "b"), report) == {KEYS[0], KEYS[1]}
    assert cache.set_remote(("a", "b"), report) == set()
    assert cache.set_remote(("a", "b"), remote(300, (ADDRS[1],), "")) == {KEYS[0], KEYS[1]}
    assert cache.sources(KEYS[0]) == ()
    assert cache.sources(KEYS[1]) == (("pod", ("a", "b")),)


def test_each_address_of_a_source_has_its_own_row() -> None:
    cache = ipcache()
    cache.set_node("far", Node("far", (OTHER,), (ADDRS[0],), (Prefix.parse("10.0.1.0/24"),)))
    rows = [cache.get(k) for k in (PrefixKey(128, OTHER), KEYS[0], PrefixKey(120, pack("10.0.1.0")))]
    assert [r.identity for r in rows if r] == [6, 6, 3]
    assert [r.tunnel == OTHER for r in rows if r] == [False, True, True]


_REPORT = st.one_of(
    st.none(),
    st.builds(
        remote,
        st.integers(256, 260),
        st.lists(st.sampled_from(ADDRS), min_size=1, max_size=3, unique=True).map(tuple),
        st.sampled_from(["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z", "2026-01-03T00:00:00Z"]),
    ),
)


@settings(max_examples=200)
@given(st.lists(st.tuples(st.integers(0, 3), _REPORT), max_size=25))
def test_history_does_not_matter(history: list[tuple[int, RemoteEndpoint | None]]) -> None:
    """After any history the youngest of the reports that still stand wins, and changed keys were all named."""
    cache = ipcache()
    state: dict[int, RemoteEndpoint] = {}
    known = {k: cache.get(k) for k in KEYS}
    for number, report in history:
        changed = cache.set_remote(("ns", str(number)), report)
        if report is None:
            state.pop(number, None)
        else:
            state[number] = report
        for key in KEYS:
            now = cache.get(key)
            assert now == known[key] or key in changed
            known[key] = now
            claims = [r for r in state.values() if key.addr in r.addrs]
            youngest = max((r.created for r in claims), default="")
            allowed = {r.identity for r in claims if r.created == youngest}
            assert now.identity == (allowed.pop() if len(allowed) == 1 else NOBODY) if now else not claims
            assert {s for s, _ in cache.sources(key)} <= {"pod"}
            assert len(cache.sources(key)) == len(claims)


def test_no_report_takes_a_nodes_address() -> None:
    cache = ipcache()
    cache.set_node("far", Node("far", (OTHER,), (ADDRS[0],), ()))
    cache.set_node("thief", Node("thief", (OWN,), (), ()))
    cache.set_remote(("evil", "pod"), remote(300, (OWN, OTHER, ADDRS[0]), "2026-01-01T00:00:00Z"))
    rows = [cache.get(PrefixKey(128, a)) for a in (OWN, OTHER, ADDRS[0])]
    assert [r.identity for r in rows if r] == [1, 6, 6]


def test_an_api_server_vouches_for_nobody_unless_it_is_a_node() -> None:
    cache = ipcache()
    outside = pack("203.0.113.1")
    cache.set_apiserver([OTHER, outside])
    assert [cache.get(PrefixKey(128, a)) for a in (OTHER, outside)] == [Remote(7, 0, NO_ADDR)] * 2
    assert PrefixKey(128, OTHER) in cache.set_node("far", Node("far", (OTHER,), (), ()))
    assert cache.get(PrefixKey(128, OTHER)) == Remote(7, REMOTE_NODE, NO_ADDR)
    assert cache.get(PrefixKey(128, outside)) == Remote(7, 0, NO_ADDR)


def test_a_pod_is_where_its_block_is() -> None:
    """Whatever its report says: a node that has another address is followed before its pods' reports are."""
    cache = ipcache()
    pod, block = pack("10.0.7.3"), Prefix.parse("10.0.7.0/24")
    cache.set_remote(("a", "b"), remote(300, (pod,), "", OTHER))

    def row() -> Remote | None:
        return cache.get(PrefixKey(128, pod))

    def node(addr: bytes | None) -> None:
        changed = cache.set_node("other", Node("other", (addr,), (), (block,)) if addr else None)
        found = cache.known_pods(changed, [(("a", "b"), remote(300, (pod,), "", OTHER))])
        assert [key for key, _ in found] == [("a", "b")]
        for key, report in found:
            cache.set_remote(key, report)

    assert row() == Remote(NOBODY, 0, NO_ADDR), "its node is not known yet"
    moved = pack("172.31.2.77")
    for addr in (moved, OTHER, moved):
        node(addr)
        found = row()
        assert found is not None and found.identity == 300
        assert found.tunnel == addr == cache.tunnel("other")
    node(None)
    found = row()
    assert found is not None and (found.identity, found.tunnel) == (300, OTHER), "deleted by mistake, perhaps"
    assert cache.tunnel("other") == NO_ADDR


@pytest.mark.parametrize("overlay", [True, False])
def test_a_report_gets_nothing_of_an_address_outside(overlay: bool) -> None:
    """Neither its packets nor its identity's rights, also if the pod has another address, which is in a block."""
    cache = IpcacheCompute("own", overlay=overlay)
    cache.set_node("other", Node("other", (OTHER,), (), (Prefix.parse("10.0.7.0/24"), Prefix.parse("fd00:7::/64"))))
    inside, inside6, outside = pack("10.0.7.3"), pack("fd00:7::3"), pack("203.0.113.9")
    cache.set_remote(("evil", "pod"), remote(300, (outside, inside, inside6), "", OTHER))
    assert cache.get(PrefixKey(128, outside)) == Remote(NOBODY, 0, NO_ADDR)
    found, found6 = (cache.get(PrefixKey(128, a)) for a in (inside, inside6))
    assert found is not None and found is found6
    assert (found.identity, found.tunnel) == (300, OTHER if overlay else NO_ADDR)


BLOCK, ELSEWHERE = Prefix.parse("10.0.7.0/24"), Prefix.parse("10.0.8.0/24")
VICTIM = pack("10.0.7.3")


def with_nodes() -> IpcacheCompute:
    cache = IpcacheCompute("own", overlay=True)
    cache.set_node("other", Node("other", (OTHER,), (), (BLOCK,)))
    cache.set_node("taken", Node("taken", (pack("172.31.3.10"),), (), (ELSEWHERE,)))
    return cache


@pytest.mark.parametrize("addrs", [(VICTIM,), (pack("10.0.8.3"), VICTIM), (pack("203.0.113.9"),), (OWN,)])
def test_a_node_reports_its_own_addresses_only(addrs: tuple[bytes, ...]) -> None:
    """A younger lie takes nothing from the true report, and nothing of it counts."""
    cache = with_nodes()
    cache.set_remote(("ns", "true"), remote(300, (VICTIM,), "2026-01-01T00:00:00Z", writer="other"))
    before = {a: cache.get(PrefixKey(128, a)) for a in (*addrs, VICTIM)}
    assert cache.set_remote(("ns", "lie"), remote(301, addrs, "2026-01-02T00:00:00Z", writer="taken")) == set()
    assert {a: cache.get(PrefixKey(128, a)) for a in (*addrs, VICTIM)} == before
    assert before[VICTIM] is not None and before[VICTIM].identity == 300
    assert list(cache.foreign) == [("ns", "lie")] and cache.foreign["ns", "lie"] in addrs
    cache.set_remote(("ns", "lie"), None)
    assert not cache.foreign


def test_a_true_report_becomes_a_lie_and_back() -> None:
    cache = with_nodes()
    mine, key = pack("10.0.8.3"), ("ns", "pod")
    cache.set_remote(key, remote(300, (mine,), "", writer="taken"))
    assert cache.set_remote(key, remote(300, (VICTIM,), "", writer="taken")) == {PrefixKey(128, mine)}
    assert cache.get(PrefixKey(128, mine)) is None
    assert cache.set_remote(key, remote(300, (mine,), "", writer="taken")) == {PrefixKey(128, mine)}
    assert not cache.foreign


def test_a_report_that_comes_before_its_nodes_block_counts_with_it() -> None:
    cache, key = with_nodes(), ("ns", "pod")
    report = remote(300, (pack("10.0.9.3"),), "", writer="taken")
    cache.set_remote(key, report)
    assert list(cache.foreign) == [key] and cache.get(PrefixKey(128, report.addrs[0])) is None
    more = Node("taken", (pack("172.31.3.10"),), (), (ELSEWHERE, Prefix.parse("10.0.9.0/24")))
    assert cache.known_pods(cache.set_node("taken", more), [(key, report)]) == [(key, report)]
    cache.set_remote(key, report)
    found = cache.get(PrefixKey(128, report.addrs[0]))
    assert found is not None and found.identity == 300 and not cache.foreign
    # Of a node that nothing is known of yet: as rule 2 says.
    cache.set_remote(("ns", "early"), remote(300, (pack("10.0.10.3"),), "", writer="new"))
    assert cache.get(PrefixKey(128, pack("10.0.10.3"))) == Remote(NOBODY, 0, NO_ADDR)


def test_a_block_that_changes_hands_takes_its_reports_with_it() -> None:
    cache, key = with_nodes(), ("ns", "pod")
    report = remote(300, (VICTIM,), "", writer="other")
    cache.set_remote(key, report)
    gone = cache.set_node("other", None)
    for one, again in cache.known_pods(gone, [(key, report)]):
        cache.set_remote(one, again)
    assert not cache.foreign, "its node is gone, by mistake perhaps: it was the last to have the block"
    changed = cache.set_node("taken", Node("taken", (pack("172.31.3.10"),), (), (ELSEWHERE, BLOCK)))
    for one, again in cache.known_pods(changed, [(key, report)]):
        cache.set_remote(one, again)
    assert cache.get(PrefixKey(128, VICTIM)) is None and cache.foreign == {key: VICTIM}


def test_two_reports_of_one_second_give_nobody_the_others_rights() -> None:
    """An address is used again while both reports are there: the younger counts; if neither is, no identity does."""
    cache, day = ipcache(), "2026-01-01T00:00:0"

    def owner() -> int:
        row = cache.get(KEYS[0])
        assert row is not None
        return row.identity

    cache.set_remote(("a", "old"), remote(300, (ADDRS[0],), day + "0Z"))
    cache.set_remote(("a", "new"), remote(301, (ADDRS[0],), day + "0Z"))
    assert owner() == NOBODY
    cache.set_remote(("a", "same"), remote(301, (ADDRS[0],), day + "0Z"))
    assert owner() == NOBODY
    cache.set_remote(("a", "old"), None)
    assert owner() == 301
    cache.set_remote(("a", "younger"), remote(302, (ADDRS[0],), day + "1Z"))
    assert owner() == 302
