"""What stays of an object after DELETE."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime
from typing import Any

from fimbria.lab.apiserver.builtin import resources
from fimbria.lab.apiserver.model import Resource
from fimbria.lab.apiserver.registry import Deletion, begin_deletion
from fimbria.lab.apiserver.services import Allocations

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def resource(plural: str) -> Resource:
    everything = resources(Allocations([ipaddress.ip_network("10.0.0.0/24")]))
    return next(one for one in everything if one.plural == plural)


def pod(node: str = "", phase: str = "Running", **meta: Any) -> Any:
    spec = {"nodeName": node} if node else {}
    return {"metadata": {"name": "p", "generation": 1} | meta, "spec": spec, "status": {"phase": phase}}


def test_pods() -> None:
    res = resource("pods")
    assert begin_deletion(res, pod(), Deletion(), NOW) is None
    assert begin_deletion(res, pod("n", "Succeeded"), Deletion(), NOW) is None
    assert begin_deletion(res, pod("n"), Deletion(grace=0), NOW) is None
    dying = begin_deletion(res, pod("n"), Deletion(), NOW)
    assert dying is not None
    assert dying["metadata"]["deletionTimestamp"] == "2026-01-01T00:00:30Z" and dying["metadata"]["generation"] == 2
    assert begin_deletion(res, dying, Deletion(), NOW) == dying
    assert begin_deletion(res, dying, Deletion(grace=60), NOW) == dying
    shorter = begin_deletion(res, dying, Deletion(grace=5), NOW)
    assert shorter is not None and shorter["metadata"]["deletionGracePeriodSeconds"] == 5
    assert begin_deletion(res, dying, Deletion(grace=0), NOW) is None


def test_finalizers_and_policies() -> None:
    res = resource("configmaps")
    plain: Any = {"metadata": {"name": "c"}}
    assert begin_deletion(res, plain, Deletion(), NOW) is None
    assert begin_deletion(res, plain, Deletion(policy="Background"), NOW) is None
    for policy, finalizer in (("Foreground", "foregroundDeletion"), ("Orphan", "orphan")):
        held = begin_deletion(res, plain, Deletion(policy=policy), NOW)
        assert held is not None and held["metadata"]["finalizers"] == [finalizer]
        assert held["metadata"]["deletionGracePeriodSeconds"] == 0
    kept = begin_deletion(res, {"metadata": {"name": "c", "finalizers": ["a/b"]}}, Deletion(), NOW)
    assert kept is not None and kept["metadata"]["finalizers"] == ["a/b"]


def test_namespaces_wait_for_their_contents() -> None:
    body: Any = {"metadata": {"name": "n"}, "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"}}
    going = begin_deletion(resource("namespaces"), body, Deletion(), NOW)
    assert going is not None and going["status"]["phase"] == "Terminating"
    assert begin_deletion(resource("namespaces"), going | {"spec": {}}, Deletion(), NOW) is None
