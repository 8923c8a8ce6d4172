"""The kernel takes every object under every setting and every pair of settings."""

import pytest
from load_all import load, settings_of


@pytest.mark.parametrize("name", ["pod", "overlay", "host", "socket"])
def test_every_pair_of_settings(name: str) -> None:
    for changed in settings_of(name):
        # The verifier gives up at a million; far below that, a stage that isn't shared any more would show here. Much
        # of it is the search for a free port: 32 probes, each also of what another version has taken.
        assert max(load(name, changed).values()) < 60_000, changed
