"""A few of upstream's specs, for every change; `python -m tests.cluster.upstream` runs all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.cluster.bed import Cluster
from tests.cluster.upstream.results import summary
from tests.cluster.upstream.runner import Bench, binaries, run
from tests.cluster.upstream.specs import AREA, CONFORMANCE, list_specs, load_skips, select, stale

# One of each: a way through the datapath that no other one takes, and short.
SUBSET = (
    "DNS should provide DNS for services [Conformance]",
    "HostPort validates that there is no conflict between pods with same hostPort but different hostIP and protocol "
    "[LinuxOnly] [Conformance]",
    "Networking Granular Checks: Pods should function for node-pod communication: udp "
    "[LinuxOnly] [NodeConformance] [Conformance]",
    "Services should have session affinity work for NodePort service [LinuxOnly] [Conformance]",
    "Services should serve endpoints on same port and different protocols [Conformance]",
    "[Feature:IPv6DualStack] Granular Checks: Services Secondary IP Family "
    "[LinuxOnly] should function for pod-Service: udp",
    "Netpol NetworkPolicy between server and client should enforce policy based on PodSelector and NamespaceSelector "
    "[Feature:NetworkPolicy]",
)


@pytest.mark.timeout(900)
def test_subset_of_upstreams_specs(cluster: Cluster, tmp_path: Path) -> None:
    wanted = {f"{AREA} {name}" for name in SUBSET}
    selection = select(wanted & set(list_specs(binaries() / "e2e.test")), load_skips())
    assert {*selection.together, *selection.alone} == wanted
    # Specs' own limits judge; this one is for a machine that stands still: the longest takes two minutes on a free one.
    found = run(Bench(cluster, tmp_path, processes=3), selection, seconds=600)
    assert {one.name for one in found.of("passed")} == wanted, summary(found)


def test_reasons_for_what_is_not_run_hold() -> None:
    """Each meets a spec of this version, and none of them hides what a conformant cluster must pass."""
    names, skips = list_specs(binaries() / "e2e.test"), load_skips()
    assert stale(names, skips) == []
    assert [name for name in select(names, skips).skipped if CONFORMANCE in name] == []
