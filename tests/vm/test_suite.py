from suite import Summary, counts


def test_counts_are_those_of_the_last_line() -> None:
    output = "1 failed in 9.00s of something\n=== 1 failed, 12 passed, 2 errors, 3 skipped in 61.07s (0:01:01) ===\n"
    assert counts(output) == {"failed": 1, "passed": 12, "error": 2, "skipped": 3}
    assert counts("Killed\n") == {}


def test_a_skip_or_nothing_at_all_is_not_ok() -> None:
    assert Summary(0, {"passed": 2}, "").ok
    assert not Summary(0, {"passed": 2, "skipped": 1}, "").ok
    assert not Summary(0, {}, "").ok
    assert not Summary(1, {"passed": 2}, "").ok
