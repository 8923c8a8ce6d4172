"""When a probe's outcomes make a container ready."""

from fimbria.lab.runner.probes import Judge
from fimbria.lab.runner.spec import Probe


def test_thresholds_count_outcomes_in_a_row() -> None:
    judge = Judge(Probe("tcp", successes=2, failures=3))
    outcomes = [True, False, True, True, False, False, True, False, False, False]
    seen = []
    for outcome in outcomes:
        judge.feed(outcome)
        seen.append(judge.ready)
    assert seen == [False, False, False, True, True, True, True, True, True, False]
