"""Identity numbers: the same on every node, whatever races, stale caches and collections do."""

from __future__ import annotations

import random
from contextlib import suppress
from itertools import takewhile

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, precondition, rule

from fimbria.decide.identity import (
    SIZE,
    Create,
    Existing,
    IdentitiesExhausted,
    IdentityAllocator,
    IdentityCollector,
    Keep,
    Use,
    displacing,
    nearly_exhausted,
    probe,
)
from fimbria.model.identity import MAX_ALLOCATED, MIN_ALLOCATED
from fimbria.model.labels import NAMESPACE, Labels


def app(name: object) -> Labels:
    return Labels({"k8s:app": str(name)})


def test_probes_are_all_numbers_each_once() -> None:
    numbers = list(probe(app("web")))
    assert len(numbers) == SIZE
    assert set(numbers) == set(range(MIN_ALLOCATED, MAX_ALLOCATED + 1))


def test_probes_depend_on_the_labels_alone() -> None:
    one = Labels({"k8s:a": "1", "k8s:b": "2"})
    other = Labels({"k8s:b": "2", "k8s:a": "1"})
    assert list(probe(one))[:5] == list(probe(other))[:5]
    # The first number of these labels is part of what is stored in clusters: it must never change.
    assert next(probe(one)) == 12379
    assert list(probe(one))[:5] != list(probe(Labels({"k8s:a": "12", "k8s:b": ""})))[:5]


def test_free_number_is_created_then_used() -> None:
    node = IdentityAllocator()
    want = node.want(app("web"), 0)
    assert want == Create(next(probe(app("web"))))
    node.on_seen(want.number, app("web"))
    assert node.want(app("web"), 1) == Use(want.number)


def test_two_nodes_at_once_agree() -> None:
    one, other = IdentityAllocator(), IdentityAllocator()
    number = one.want(app("web"), 0).number
    assert other.want(app("web"), 0) == Create(number)
    one.on_seen(number, app("web"))
    other.on_conflict(app("web"), number, app("web"), marked=False, now=0)
    assert one.want(app("web"), 0) == other.want(app("web"), 0) == Use(number)


def test_taken_number_leads_to_the_next_probe() -> None:
    node = IdentityAllocator()
    first, second = list(probe(app("web")))[:2]
    assert node.want(app("web"), 0) == Create(first)
    node.on_conflict(app("web"), first, app("db"), marked=False, now=0)
    assert node.want(app("web"), 0) == Create(second)


def test_a_cache_alone_never_skips_a_probe() -> None:
    node = IdentityAllocator()
    first = next(probe(app("web")))
    node.on_seen(first, app("db"))
    assert node.want(app("web"), 0) == Create(first)


def test_marked_holder_is_kept_before_it_is_skipped() -> None:
    node = IdentityAllocator()
    first, second = list(probe(app("web")))[:2]
    node.want(app("web"), 0)
    node.on_conflict(app("web"), first, app("db"), marked=True, now=0)
    assert node.want(app("web"), 0) == Keep(first)
    node.on_kept(app("web"), first)
    assert node.want(app("web"), 0) == Create(second)


def test_marked_holder_that_vanished_starts_the_walk_again() -> None:
    node = IdentityAllocator()
    first = next(probe(app("web")))
    node.want(app("web"), 0)
    node.on_conflict(app("web"), first, app("db"), marked=True, now=0)
    node.on_gone(first)
    assert node.want(app("web"), 0) == Create(first)


def test_a_walk_that_took_too_long_starts_again() -> None:
    node = IdentityAllocator(window=10)
    first, second = list(probe(app("web")))[:2]
    node.want(app("web"), 0)
    node.on_conflict(app("web"), first, app("db"), marked=False, now=1)
    assert node.want(app("web"), 10) == Create(second)
    assert node.want(app("web"), 10.1) == Create(first)


def test_own_marked_identity_is_kept_before_use() -> None:
    node = IdentityAllocator()
    node.on_seen(300, app("web"), marked=True)
    assert node.want(app("web"), 0) == Keep(300)
    node.on_kept(app("web"), 300)
    assert node.want(app("web"), 0) == Use(300)


def test_gone_identity_names_the_labels_to_want_again() -> None:
    node = IdentityAllocator()
    node.on_seen(300, app("web"))
    assert node.on_gone(300) == app("web")
    assert node.on_gone(300) is None
    assert node.number(app("web")) is None


def test_of_two_numbers_every_node_takes_the_lower() -> None:
    node = IdentityAllocator()
    node.on_seen(400, app("web"))
    node.on_seen(300, app("web"))
    assert node.want(app("web"), 0) == Use(300)


def of(namespace: str, number: int) -> Labels:
    return Labels({NAMESPACE: namespace, "k8s:n": str(number)})


def test_a_namespace_leaves_half_of_the_numbers_to_the_others() -> None:
    node, size = IdentityAllocator(size=64), 64
    for n in range(size // 2):
        number = next(p for p in probe(of("greedy", n), size) if node.labels(p) is None)
        node.on_seen(number, of("greedy", n))
        node.on_seen(number, of("greedy", n))  # again: it counts once
    with pytest.raises(
        IdentitiesExhausted, match="namespace greedy has 32 identities, and none may have more than half"
    ):
        node.want(of("greedy", 99), 0)
    assert node.want(of("greedy", 3), 0) == Use(node.number(of("greedy", 3)) or 0), "those that exist go on"
    assert isinstance(node.want(of("other", 1), 0), Create)
    assert isinstance(node.want(app("of nobody"), 0), Create)
    node.on_gone(node.number(of("greedy", 3)) or 0)
    assert isinstance(node.want(of("greedy", 99), 0), Create)
    # A number that changes hands counts for who has it.
    taken = node.number(of("greedy", 4)) or 0
    node.on_seen(taken, of("other", 7))
    node.on_seen(400, of("greedy", 98))
    node.on_gone(taken)
    assert node._in_namespace == {"greedy": 31}


def test_a_space_that_fills_up_is_said_with_who_fills_it() -> None:
    held = [of("greedy", n) for n in range(70)] + [of("b", n) for n in range(9)]
    assert nearly_exhausted(held, 100) == ""
    text = nearly_exhausted([*held, app("host")], 100)
    assert text.startswith("80 % of the 100 identities are in use") and "greedy (70), b (9), no namespace (1)" in text


def test_exhausted_space_is_said() -> None:
    node = IdentityAllocator(size=2)
    for number in probe(app("web"), 2):
        assert node.want(app("web"), 0) == Create(number)
        if number == list(probe(app("web"), 2))[-1]:
            with pytest.raises(IdentitiesExhausted, match="all 2 identity numbers"):
                node.on_conflict(app("web"), number, app("db"), marked=False, now=0)
        else:
            node.on_conflict(app("web"), number, app("db"), marked=False, now=0)


def test_unused_is_marked_then_deleted_after_the_grace() -> None:
    collector = IdentityCollector(grace=10)
    fresh = {300: Existing(app("a"))}
    # Where a lone identity sits doesn't matter here: nobody else could be displaced by it.
    assert collector.collect(fresh, frozenset(), 0).mark == {300}
    marked = {300: Existing(app("a"), marked=True)}
    assert not collector.collect(marked, frozenset(), 5).delete
    assert not collector.collect(marked, frozenset(), 14).delete
    assert collector.collect(marked, frozenset(), 15).delete == {300}


def test_use_unmarks_and_the_grace_begins_anew() -> None:
    collector = IdentityCollector(grace=10)
    marked = {300: Existing(app("a"), marked=True)}
    collector.collect(marked, frozenset(), 0)
    assert collector.collect(marked, frozenset({300}), 5).unmark == {300}
    assert not collector.collect(marked, frozenset(), 12).delete


def test_who_displaced_another_stays() -> None:
    first, second = list(probe(app("web")))[:2]
    existing = {first: Existing(app("db"), marked=True), second: Existing(app("web"))}
    assert displacing(existing) == {first}
    collector = IdentityCollector(grace=0)
    assert collector.collect(existing, frozenset(), 0).unmark == {first}
    assert collector.collect(existing, frozenset(), 0).mark == {second}


def test_reserved_and_foreign_numbers_are_left_alone() -> None:
    existing = {1: Existing(app("a"), marked=True), 70000: Existing(app("b"), marked=True)}
    outcome = IdentityCollector(grace=0).collect(existing, frozenset(), 0)
    assert not outcome.mark | outcome.unmark | outcome.delete


# --- the proof: nodes with stale caches, an API server, a collector, in any order ----------------------------------

SMALL = 5  # few numbers, so that labels collide all the time
NAMES = 6
WINDOW = 10.0
REQUEST = 5.0  # no request takes longer, and no watch lags behind by more
GRACE = 30.0

Event = tuple[float, int, Labels, bool | None]  # sent when; marked, or None if the identity is gone


class Cluster:
    """The API server's state is `server`; each node learns of it late. Requests take a while."""

    def __init__(self) -> None:
        self.now = 0.0
        self.server: dict[int, Existing] = {}
        self.writes = 0
        self.deletions = 0
        self.nodes: list[IdentityAllocator] = []
        self.watches: list[list[Event]] = []
        self.uses: list[dict[Labels, int]] = []
        self.requests: list[tuple[float, int, Labels, Create | Keep]] = []
        self.collector = IdentityCollector(GRACE, SMALL)

    def add_node(self) -> None:
        self.nodes.append(IdentityAllocator(WINDOW, SMALL))
        self.watches.append([(self.now, n, one.labels, one.marked) for n, one in self.server.items()])
        self.uses.append({})

    def want(self, node: int, labels: Labels) -> None:
        if any(n == node and wanted == labels for _, n, wanted, _ in self.requests):
            return
        decision = self.nodes[node].want(labels, self.now)
        if isinstance(decision, Use):
            self.uses[node][labels] = decision.number
        else:
            self.requests.append((self.now, node, labels, decision))

    def stop_using(self, node: int, labels: Labels) -> None:
        self.uses[node].pop(labels, None)

    def serve(self, index: int) -> None:
        _, node, labels, decision = self.requests.pop(index)
        number, held = decision.number, self.server.get(decision.number)
        with suppress(IdentitiesExhausted):
            if isinstance(decision, Keep):
                self._keep(self.nodes[node], number, labels, held)
            elif held is None:
                self._write(number, labels, marked=False)
                self.nodes[node].on_seen(number, labels)
            else:
                self.nodes[node].on_conflict(labels, number, held.labels, held.marked, self.now)

    def _keep(self, node: IdentityAllocator, number: int, labels: Labels, held: Existing | None) -> None:
        if held is None:
            node.on_gone(number)
            return
        self._write(number, held.labels, marked=False)
        node.on_seen(number, held.labels)
        node.on_kept(labels, number)

    def deliver(self, node: int) -> None:
        _, number, labels, marked = self.watches[node].pop(0)
        if marked is None:
            self.nodes[node].on_gone(number)
            self.uses[node].pop(labels, None)
        else:
            self.nodes[node].on_seen(number, labels, marked)

    def wait(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 1.0)
            while overdue := [n for n, request in enumerate(self.requests) if self.now - request[0] >= REQUEST]:
                self.serve(overdue[0])
            for node, watch in enumerate(self.watches):
                while watch and self.now - watch[0][0] >= REQUEST:
                    self.deliver(node)

    def collect(self) -> None:
        used = {number for uses in self.uses for number in uses.values()}
        outcome = self.collector.collect(dict(self.server), used, self.now)
        for number in outcome.mark | outcome.unmark:
            self._write(number, self.server[number].labels, marked=number in outcome.mark)
        for number in outcome.delete:
            self.deletions += 1
            self._tell(number, self.server.pop(number).labels, None)

    def _write(self, number: int, labels: Labels, marked: bool) -> None:
        self.writes += 1
        self.server[number] = Existing(labels, marked, str(self.writes))
        self._tell(number, labels, marked)

    def _tell(self, number: int, labels: Labels, marked: bool | None) -> None:
        for watch in self.watches:
            watch.append((self.now, number, labels, marked))

    def check(self) -> None:
        held = [one.labels for one in self.server.values()]
        assert len(held) == len(set(held)), f"labels with two numbers: {self.server}"
        for number, one in self.server.items():
            earlier = takewhile(lambda n, number=number: n != number, probe(one.labels, SMALL))
            assert all(n in self.server for n in earlier), f"{number} sits behind a free probe: {self.server}"


class ClusterMachine(RuleBasedStateMachine):
    nodes = Bundle("nodes")

    def __init__(self) -> None:
        super().__init__()
        self.cluster = Cluster()

    @rule(target=nodes)
    def add_node(self) -> int:
        self.cluster.add_node()
        return len(self.cluster.nodes) - 1

    @rule(node=nodes, name=st.integers(0, NAMES - 1))
    def want(self, node: int, name: int) -> None:
        self.cluster.want(node, app(name))

    @rule(node=nodes, name=st.integers(0, NAMES - 1))
    def stop_using(self, node: int, name: int) -> None:
        self.cluster.stop_using(node, app(name))

    @precondition(lambda self: self.cluster.requests)
    @rule(data=st.data())
    def serve(self, data: st.DataObject) -> None:
        self.cluster.serve(data.draw(st.integers(0, len(self.cluster.requests) - 1)))

    @rule(node=nodes)
    def deliver(self, node: int) -> None:
        if self.cluster.watches[node]:
            self.cluster.deliver(node)

    @rule(seconds=st.sampled_from([1.0, 4.0, GRACE + 1]))
    def wait(self, seconds: float) -> None:
        self.cluster.wait(seconds)

    @rule()
    def collect(self) -> None:
        self.cluster.collect()

    @invariant()
    def one_number(self) -> None:
        self.cluster.check()


ClusterMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestClusterMachine = ClusterMachine.TestCase


@pytest.mark.parametrize("seed", range(4))
def test_long_random_walks(seed: int) -> None:
    """Thousands of creations and collections, in an order that the machine above would rarely find."""
    source = random.Random(seed)
    cluster = Cluster()
    for _ in range(3):
        cluster.add_node()
    for _ in range(4_000):
        node, labels = source.randrange(3), app(source.randrange(NAMES))
        match source.choices(("want", "stop", "serve", "deliver", "wait", "collect"), (3, 4, 4, 3, 4, 3))[0]:
            case "want":
                cluster.want(node, labels)
            case "stop":
                cluster.stop_using(node, labels)
            case "serve" if cluster.requests:
                cluster.serve(source.randrange(len(cluster.requests)))
            case "deliver" if cluster.watches[node]:
                cluster.deliver(node)
            case "wait":
                cluster.wait(source.choice((1.0, 4.0, 12.0)))
            case "collect":
                cluster.collect()
        cluster.check()
    assert cluster.deletions > 20, "the walk must exercise collection"


def test_without_the_displacement_rule_the_check_would_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof has teeth: collecting an identity that displaced another one gives labels a second number."""
    monkeypatch.setattr("fimbria.decide.identity.displacing", lambda existing, size: set())
    with pytest.raises(AssertionError, match=r"free probe|two numbers"):
        for seed in range(4):
            test_long_random_walks(seed)
