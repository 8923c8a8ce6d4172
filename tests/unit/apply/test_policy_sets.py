"""Changes of policy sets in place: the order of writes, step by step, on a model of the kernel's look-up."""

import random

from fimbria.apply.policy_sets import SMALL, SetContent, Step, steps
from fimbria.model.identity import SCOPE_CIDR
from fimbria.model.rows import PolicyEntry, PolicyKey

ALLOW, DENY = 1, 2
Content = dict[PolicyKey, PolicyEntry]
CELLS = [(40, 0, 0), (48, 6, 0), (60, 6, 80), (64, 6, 80), (64, 6, 81), (48, 17, 0)]
QUERIES = [(6, 80), (6, 81), (6, 99), (17, 53), (132, 1)]


def key(peer: int, cell: tuple[int, int, int]) -> PolicyKey:
    return PolicyKey(cell[0], peer, 0, cell[1], cell[2])


def vote(content: Content, peer: int, proto: int, port: int) -> int:
    """The longest entry of one peer, as the trie finds it."""
    best, verdict = -1, 0
    for k, entry in content.items():
        bits = max(0, k.prefixlen - 48)
        same_port = port >> (16 - bits) == k.port >> (16 - bits) if bits else True
        if k.peer == peer and k.prefixlen > best and (k.prefixlen < 48 or k.proto == proto) and same_port:
            best, verdict = k.prefixlen, entry.verdict
    return verdict


def allowed(content: Content, peer: int, proto: int, port: int) -> bool:
    votes = {vote(content, peer, proto, port), vote(content, 0, proto, port)}
    return DENY not in votes and ALLOW in votes


def random_content(rng: random.Random, peers: list[int]) -> Content:
    """As the compiler makes it: no allow below a deny."""
    content: Content = {}
    for peer in peers:
        for cell in CELLS:
            if rng.random() < 0.4:
                content[key(peer, cell)] = PolicyEntry(rng.choice((ALLOW, DENY)), 0, rng.randrange(1, 4))
        for cell in CELLS:
            k = key(peer, cell)
            if k in content and content[k].verdict == ALLOW and vote_above(content, k) == DENY:
                del content[k]
    return content


def vote_above(content: Content, k: PolicyKey) -> int:
    shorter = {c: e for c, e in content.items() if c.peer == k.peer and c.prefixlen < k.prefixlen}
    denies = {c: e for c, e in shorter.items() if e.verdict == DENY}
    return vote(denies, k.peer, k.proto, k.port)


def instants(old: Content, plan: list[Step], rng: random.Random) -> list[Content]:
    """Every content that a packet may meet: a batch is written entry by entry, in any order."""
    now, seen = dict(old), []
    for step in plan:
        moves = [(k, step.upserts[k]) for k in step.upserts]
        rng.shuffle(moves)
        for k, entry in moves:
            now[k] = entry
            seen.append(dict(now))
        for k in rng.sample(step.deletes, len(step.deletes)):
            del now[k]
            seen.append(dict(now))
    return seen


def check(rng: random.Random, changing: list[int], fixed: Content) -> int:
    old = random_content(rng, changing) | fixed
    new = random_content(rng, changing) | fixed
    plan = steps(old, new, [k for k in old.keys() | new.keys() if k.peer in changing])
    assert plan is not None
    seen = instants(old, plan, rng)
    assert (seen[-1] if seen else old) == new
    for now in seen:
        for peer in (5, 6, 7):
            for proto, port in QUERIES:
                was, will, is_ = (allowed(c, peer, proto, port) for c in (old, new, now))
                assert is_ <= (was or will), (old, new, now, peer, proto, port)
                assert is_ or not (was and will), (old, new, now, peer, proto, port)
    return len(seen)


def test_no_instant_allows_what_is_denied_before_and_after_nor_denies_what_is_allowed() -> None:
    rng = random.Random(7)
    for _ in range(400):
        check(rng, [5, 6], random_content(rng, [0]))
        check(rng, [0], random_content(rng, [5, 6]))


def test_the_check_above_sees_a_wrong_order() -> None:
    """Allows before denies: an identity that is both allowed and denied gets through for a moment."""
    old: Content = {key(0, (40, 0, 0)): PolicyEntry(DENY, 0, 1), key(5, (40, 0, 0)): PolicyEntry(DENY, 0, 1)}
    new: Content = {key(0, (40, 0, 0)): PolicyEntry(ALLOW, 0, 1), key(5, (48, 6, 0)): PolicyEntry(DENY, 0, 1)}
    wrong = [Step(upserts={key(0, (40, 0, 0)): new[key(0, (40, 0, 0))]}), Step(deletes=[key(5, (40, 0, 0))]),
             Step(upserts={key(5, (48, 6, 0)): new[key(5, (48, 6, 0))]})]  # fmt: skip
    seen = instants(old, wrong, random.Random(1))
    assert any(allowed(now, 5, 6, 80) and not allowed(old, 5, 6, 80) and not allowed(new, 5, 6, 80) for now in seen)


def test_changes_of_several_votes_of_one_packet_have_no_order() -> None:
    one, entry = (40, 0, 0), PolicyEntry(ALLOW, 0, 1)
    assert steps({}, {key(5, one): entry, key(0, one): entry}, [key(5, one), key(0, one)]) is None
    assert steps({}, {key(SCOPE_CIDR | 1, one): entry}, [key(SCOPE_CIDR | 1, one)]) is None
    assert steps({}, {key(5, one): entry, key(6, one): entry}, [key(5, one), key(6, one)]) is not None


def test_contents_know_what_changed_since() -> None:
    rng = random.Random(3)
    history = [SetContent(random_content(rng, list(range(1, 30))))]
    for _ in range(300):
        last, fresh = history[-1], random_content(rng, [rng.randrange(1, 30)])
        peers = {k.peer for k in fresh}
        gone = [k for k in last if k.peer in peers and k not in fresh]
        history.append(last.derive({k: v for k, v in fresh.items() if last.get(k) != v}, gone))
        assert history[-1] == {k: v for k, v in last.items() if k not in gone} | fresh
    usable = 0
    for at, now in enumerate(history):
        assert len(now.changed) <= SMALL
        for then in history[max(0, at - 20) : at]:
            if now.since <= then.serial:
                usable += 1
                assert {k for k in then.keys() | now.keys() if then.get(k) != now.get(k)} <= now.changed
    assert usable > 300


def test_a_large_change_says_that_nothing_is_known() -> None:
    first = SetContent({})
    rows = {PolicyKey(40, n, 0, 0, 0): PolicyEntry(ALLOW, 0, 1) for n in range(1, SMALL + 2)}
    second = first.derive(rows, ())
    assert second.since > first.serial
    assert not second.changed
