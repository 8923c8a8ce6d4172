"""A frontend that denies source ranges isn't opened before all of them are in the kernel."""

from fimbria.agent.engine import DesiredRows
from fimbria.agent.requires import of_frontend
from fimbria.compute.service_frontends import SOURCE_DENY, SOURCE_RANGES, source_key
from fimbria.model.address import Prefix, pack
from fimbria.model.rows import Frontend, FrontendKey

KEY = FrontendKey(pack("203.0.113.1"), 80, 6)
MINE, OTHERS = (source_key(n, Prefix.parse("10.0.0.0/16")) for n in (1, 2))
GONE = source_key(1, Prefix.parse("10.1.0.0/16"))


def test_only_those_of_its_own_service_that_are_wanted_and_failed() -> None:
    rows = DesiredRows()
    rows.source_ranges.put_many({MINE: 1, OTHERS: 1})
    requires = of_frontend(rows)
    denies = Frontend(1, 1, SOURCE_RANGES | SOURCE_DENY)
    assert list(requires(KEY, denies)) == []
    rows.source_ranges.failed.update(dict.fromkeys((MINE, OTHERS, GONE), "full"))
    assert list(requires(KEY, denies)) == [("source_ranges", MINE)]
    # One that admits ranges admits fewer without a row: that can wait.
    assert list(requires(KEY, Frontend(1, 1, SOURCE_RANGES))) == []
