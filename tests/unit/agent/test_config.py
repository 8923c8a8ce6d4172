"""Settings of the agent: where they come from, and that what can't be used is refused by name."""

from __future__ import annotations

import pytest

from fimbria.agent.config import AgentConfig, ConfigError, parse
from fimbria.apply.xdp import MODES

NODE = ["--node-name", "n1"]


@pytest.mark.parametrize(("word", "on"), [("1", True), ("on", True), ("Yes", True), ("0", False), ("off", False)])
def test_switches_come_from_the_environment_in_words(word: str, on: bool) -> None:
    assert parse(NODE, {"FIMBRIA_MASQUERADE": word}).masquerade is on


def test_an_argument_wins_over_the_environment() -> None:
    environ = {"FIMBRIA_ROUTING": "native", "FIMBRIA_MASQUERADE": "off", "FIMBRIA_NODE_NAME": "other"}
    config = parse([*NODE, "--routing", "overlay", "--masquerade"], environ)
    assert (config.node_name, config.routing, config.masquerade) == ("n1", "overlay", True)


@pytest.mark.parametrize(
    ("argv", "environ", "named"),
    [
        ([], {}, "--node-name"),
        (NODE, {"FIMBRIA_FAST_PATH": "ture"}, "FIMBRIA_FAST_PATH"),
        ([*NODE, "--routing", "tunnel"], {}, "--routing"),
        ([*NODE, "--attach", "xdp"], {}, "--attach"),
        ([*NODE, "--xdp", "on"], {}, "--xdp"),
        ([*NODE, "--masquerade-ports", "9-1"], {}, "--masquerade-ports"),
        ([*NODE, "--node-ports", "30000"], {}, "--node-ports"),
        ([*NODE, "--log-level", "loud"], {}, "--log-level"),
        ([*NODE, "--mtu", "-1"], {}, "--mtu"),
        ([*NODE, "--overlay-port", "99999"], {}, "--overlay-port"),
        ([*NODE, "--conntrack-entries", "-5"], {}, "--conntrack-entries"),
        ([*NODE, "--audit-interval", "-1"], {}, "--audit-interval"),
        ([*NODE, "--healthz-listen", "10256"], {}, "--healthz-listen"),
        ([*NODE, "--metrics-listen", "localhost:"], {}, "--metrics-listen"),
        ([*NODE, "--label-filter", "["], {}, "--label-filter"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(argv: list[str], environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(argv, environ)


def test_the_defaults_can_be_used() -> None:
    AgentConfig(node_name="n1").check()


def test_every_mode_of_xdp_that_can_be_set_can_be_attached() -> None:
    assert {parse([*NODE, "--xdp", mode], {}).xdp for mode in MODES} == set(MODES)
