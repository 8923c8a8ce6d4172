"""What a row needs in the kernel before it may be written: what the apply loop holds it back for.

Rows of one pass are taken together and written references first, so what counts is what *failed*.
"""

from __future__ import annotations

from typing import Any, Final

from fimbria.agent.engine import DesiredRows, Engine
from fimbria.apply.attach import EGRESS, INGRESS, DeviceHook
from fimbria.apply.loop import Require
from fimbria.compute.service_frontends import SOURCE_DENY
from fimbria.model.rows import Endpoint, Frontend, FrontendKey

CIDR_RULES: Final = 8 | 16  # enum endpoint_flag: CIDR_INGRESS, CIDR_EGRESS
Needed = tuple[str, Any]


def of_endpoint(rows: DesiredRows) -> Require:
    """An endpoint is opened with its programs, its policy set, and the prefixes that the set's rules speak about."""

    def requires(ifindex: int, row: Endpoint) -> list[Needed]:
        needed: list[Needed] = [("device_links", DeviceHook(ifindex, side)) for side in (INGRESS, EGRESS)]
        if row.policy_set:
            needed.append(("policy_sets", row.policy_set))
        if row.flags & CIDR_RULES:
            # Which sets speak about a prefix isn't asked: prefixes fail together, when their map is full.
            needed += [("cidrs", prefix) for prefix in rows.cidrs.failed if prefix in rows.cidrs.desired]
        return needed

    return requires


def of_identity(engine: Engine) -> Require:
    """An identity counts as compiled once every set that says something about it is written."""

    def requires(number: int, _row: int) -> list[Needed]:
        return [("policy_sets", n) for n in engine.failed_sets_about(number)]

    return requires


def of_frontend(rows: DesiredRows) -> Require:
    """A frontend that denies source ranges waits for all of them: a missing one would admit those it denies."""

    def requires(_key: FrontendKey, row: Frontend) -> list[Needed]:
        if not row.flags & SOURCE_DENY or not rows.source_ranges.failed:
            return []
        failed = (key for key in rows.source_ranges.failed if key in rows.source_ranges.desired)
        return [("source_ranges", key) for key in failed if key.service == row.service]

    return requires
