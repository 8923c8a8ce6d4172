"""Numbers against their rules, and against a dict that never forgets."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from fimbria.decide.numbers import Numbers, NumbersExhausted


def test_a_key_keeps_its_number() -> None:
    numbers = Numbers[str]("things")
    assert [numbers.take(k) for k in "aba"] == [1, 2, 1]
    assert numbers.get("b") == 2
    assert numbers.key(2) == "b"
    assert numbers.get("c") is None
    assert numbers.key(3) is None


def test_a_freed_number_rests_until_the_range_is_through() -> None:
    numbers = Numbers[str]("things", 1, 3)
    numbers.take("a")
    assert numbers.release("a") == 1
    assert [numbers.take(k) for k in "bc"] == [2, 3]
    assert numbers.take("a") == 1


def test_releasing_what_has_no_number_is_no_error() -> None:
    assert Numbers[str]("things").release("a") is None


def test_exhausted_names_what_and_how_many_and_frees_again() -> None:
    numbers = Numbers[str]("policy sets", 5, 6)
    numbers.take("a")
    numbers.take("b")
    with pytest.raises(NumbersExhausted, match="policy sets: all 2"):
        numbers.take("c")
    assert numbers.take("a") == 5
    numbers.release("a")
    assert numbers.take("c") == 5


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValueError, match="no numbers for things"):
        Numbers[str]("things", 2, 1)


def test_restored_numbers_stay_and_new_ones_come_after_them() -> None:
    numbers = Numbers[str]("things")
    assert numbers.restore([("a", 7), ("b", 3)]) == []
    assert [numbers.take(k) for k in "bac"] == [3, 7, 8]


def test_spent_numbers_rest_too() -> None:
    numbers = Numbers[str]("things")
    numbers.restore([("a", 7)], spent=[12, 9])
    assert numbers.take("b") == 13


def test_restored_numbers_that_nobody_takes_are_freed_by_settle_only() -> None:
    numbers = Numbers[str]("things", 1, 3)
    numbers.restore([("a", 1), ("b", 2)])
    numbers.take("a")
    assert numbers.take("c") == 3
    with pytest.raises(NumbersExhausted):
        numbers.take("d")
    assert numbers.settle() == {"b": 2}
    assert numbers.settle() == {}
    assert numbers.take("d") == 2


def test_contradicting_rows_are_refused_and_their_numbers_rest() -> None:
    numbers = Numbers[str]("things", 1, 100)
    rows = [("a", 4), ("a", 5), ("b", 4), ("c", 0), ("d", 101)]
    assert numbers.restore(rows) == [("a", 5), ("b", 4), ("c", 0), ("d", 101)]
    assert [numbers.take(k) for k in "ab"] == [4, 6]


def test_restoring_the_last_number_wraps() -> None:
    numbers = Numbers[str]("things", 1, 3)
    numbers.restore([("a", 3)])
    assert numbers.take("b") == 1


def test_a_waiting_number_can_be_taken_over_under_another_key() -> None:
    numbers: Numbers[str] = Numbers("things")
    numbers.restore([("old", 5), ("other", 6)])
    assert numbers.adopt("new", 5)
    assert (numbers.get("new"), numbers.get("old"), numbers.key(5)) == (5, None, "new")
    assert numbers.take("new") == 5
    assert not numbers.adopt("new", 6)  # it has one
    assert not numbers.adopt("third", 5)  # it waits no more
    assert not numbers.adopt("third", 9)  # nobody's
    assert numbers.settle() == {"other": 6}
    assert numbers.get("new") == 5


def test_too_late_to_restore() -> None:
    numbers = Numbers[str]("things")
    numbers.take("a")
    with pytest.raises(ValueError, match="too late"):
        numbers.restore([("b", 2)])


@given(st.dictionaries(st.text(max_size=3), st.integers(-2, 30)), st.lists(st.integers(-2, 30)))
def test_after_any_restore_numbers_are_unique_and_in_range(rows: dict[str, int], spent: list[int]) -> None:
    numbers = Numbers[str]("things", 1, 20)
    refused = dict(numbers.restore(rows.items(), spent))
    kept = {k: n for k, n in rows.items() if k not in refused}
    assert len(set(kept.values())) == len(kept)
    assert {k: numbers.take(k) for k in kept} == kept
    taken = [numbers.take(str(i) + "new") for i in range(20 - len(kept))]
    assert sorted([*taken, *kept.values()]) == list(range(1, 21))


class NumbersMachine(RuleBasedStateMachine):
    """A small range, so that it wraps often."""

    KEYS = st.sampled_from([f"k{i}" for i in range(12)])

    def __init__(self) -> None:
        super().__init__()
        self.numbers = Numbers[str]("things", 1, 8)
        self.model: dict[str, int] = {}
        self.last = 8

    @rule(key=KEYS)
    def take(self, key: str) -> None:
        if key not in self.model and len(self.model) == 8:
            with pytest.raises(NumbersExhausted):
                self.numbers.take(key)
            return
        number = self.numbers.take(key)
        if key in self.model:
            assert number == self.model[key]
            return
        assert number not in self.model.values()
        # Going round: every number between the last one given and this one is in use.
        between = [n % 8 + 1 for n in range(self.last, self.last + (number - self.last - 1) % 8)]
        assert set(between) <= set(self.model.values())
        self.last = number
        self.model[key] = number

    @rule(key=KEYS)
    def release(self, key: str) -> None:
        assert self.numbers.release(key) == self.model.pop(key, None)

    @invariant()
    def same(self) -> None:
        assert dict(self.numbers.items()) == self.model
        assert all(self.numbers.key(n) == k for k, n in self.model.items())


NumbersMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=50, deadline=None)
TestNumbersMachine = NumbersMachine.TestCase
