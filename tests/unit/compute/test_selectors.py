"""The selector cache says at any time what asking every selector about every label set would say."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fimbria.compute.selectors import SelectorCache
from fimbria.model.labels import Labels
from fimbria.model.policy import Operator, Requirement, Selector

KEYS = ("k8s:a", "k8s:b", "reserved:b")
VALUES = ("1", "2", "3")
REQUIREMENTS = st.one_of(
    st.builds(
        Requirement,
        st.lists(st.sampled_from(KEYS), min_size=1, max_size=2, unique=True).map(tuple),
        st.sampled_from([Operator.IN, Operator.NOT_IN]),
        st.lists(st.sampled_from(VALUES), min_size=1, max_size=2, unique=True).map(tuple),
    ),
    st.builds(
        Requirement,
        st.sampled_from(KEYS).map(lambda k: (k,)),
        st.sampled_from([Operator.EXISTS, Operator.DOES_NOT_EXIST]),
    ),
)
SELECTORS = st.lists(REQUIREMENTS, max_size=3).map(Selector)
LABELS = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES)).map(Labels)


class Machine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.cache: SelectorCache[int] = SelectorCache()
        self.selectors: list[Selector] = []
        self.owners: dict[int, Labels] = {}

    @rule(selector=SELECTORS)
    def add(self, selector: Selector) -> None:
        self.cache.add_selector(selector)
        self.selectors.append(selector)

    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        if self.selectors:
            self.cache.remove_selector(self.selectors.pop(data.draw(st.integers(0, len(self.selectors) - 1))))

    @rule(owner=st.integers(0, 5), labels=LABELS)
    def set(self, owner: int, labels: Labels) -> None:
        before = self.expected(owner)
        self.owners[owner] = labels
        assert self.cache.set(owner, labels) == before ^ self.expected(owner)

    @rule(owner=st.integers(0, 5))
    def delete(self, owner: int) -> None:
        before = self.expected(owner)
        self.owners.pop(owner, None)
        assert self.cache.delete(owner) == before

    def expected(self, owner: int) -> set[Selector]:
        return {s for s in self.selectors if owner in self.owners and s.matches(self.owners[owner])}

    @invariant()
    def same_as_asking_everyone(self) -> None:
        for owner in self.owners:
            assert self.cache.matching(owner) == self.expected(owner)
        for selector in self.selectors:
            assert self.cache.members(selector) == {o for o in self.owners if selector.matches(self.owners[o])}


Machine.TestCase.settings = settings(max_examples=60, deadline=None)
TestSelectorCache = Machine.TestCase


def test_nothing_is_left_behind() -> None:
    cache: SelectorCache[int] = SelectorCache()
    selector = Selector([Requirement(("k8s:a",), Operator.IN, ("1", "2"))])
    cache.add_selector(selector)
    cache.set(1, Labels({"k8s:a": "1"}))
    cache.remove_selector(selector)
    cache.delete(1)
    assert not cache._waiting and not cache._by_label and not cache._matched and not cache._members


def test_only_selectors_that_could_match_are_asked() -> None:
    cache: SelectorCache[int] = SelectorCache()
    for n in range(1000):
        cache.add_selector(
            Selector(
                [Requirement(("k8s:ns",), Operator.IN, (f"n{n}",)), Requirement(("k8s:app",), Operator.IN, ("web",))]
            )
        )
    waiting = list(cache._waiting_for(Labels({"k8s:ns": "n7", "k8s:app": "web"})))
    assert len(waiting) <= 2


def test_absent_key_meets_not_in_and_any_source_looks_at_all() -> None:
    labels = Labels({"reserved:host": ""})
    assert Requirement(("k8s:x",), Operator.NOT_IN, ("1",)).matches(labels)
    assert Requirement(("k8s:host", "reserved:host"), Operator.EXISTS).matches(labels)
    assert not Requirement(("k8s:host", "reserved:host"), Operator.DOES_NOT_EXIST).matches(labels)
