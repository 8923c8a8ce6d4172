"""What the operator tells about NetworkPolicies."""

import asyncio
from typing import Any

import msgspec
import pytest

from fimbria.model.labels import DEFAULT_FILTER
from fimbria.operator.policies import Finding, NetworkPolicyEvents, PolicyStatusWriter, Verdict, inspect
from fimbria.sources.k8s.errors import Forbidden
from fimbria.sources.k8s.policies import Vocabulary
from fimbria.sources.k8s.resources import CILIUM_NETWORK_POLICIES
from fimbria.sources.k8s.types.networking import NetworkPolicy
from fimbria.tables.table import Table

WORDS = Vocabulary(DEFAULT_FILTER, "default")
Told = tuple[str, str, str]


class Recorder:
    def __init__(self) -> None:
        self.told: list[Told] = []

    def emit(self, resource: Any, meta: Any, kind: str, reason: str, message: str) -> None:
        assert (resource.kind, kind, reason) == ("NetworkPolicy", "Warning", "NotEnforcedAsWritten")
        self.told.append((meta.namespace, meta.name, message))


def policy(*cidrs: str, uid: str = "u1") -> Finding:
    rules = [{"from": [{"ipBlock": {"cidr": c}}]} for c in cidrs]
    meta = {"name": "p", "namespace": "shop", "uid": uid}
    obj = {"metadata": meta, "spec": {"podSelector": {}, "ingress": rules}}
    return inspect(WORDS)(msgspec.json.decode(msgspec.json.encode(obj), type=NetworkPolicy))


@pytest.mark.parametrize(("cidrs", "problems"), [("10.0.0.0/8", 0), ("10.0.0.0/33", 1), ("x 10.0.0.0/99", 2)])
def test_what_is_found(cidrs: str, problems: int) -> None:
    found = policy(*cidrs.split())
    assert len(found.problems) == problems
    assert all(str(p).startswith("spec.ingress[") for p in found.problems)


async def test_each_problem_is_told_once_when_it_appears() -> None:
    recorder, findings = Recorder(), Table[Any, Finding]("networkpolicies")
    task = asyncio.create_task(NetworkPolicyEvents(recorder, findings).run())  # type: ignore[arg-type]

    async def after(found: Finding | None) -> list[str]:
        recorder.told.clear()
        if found is None:
            findings.delete(("shop", "p"))
        else:
            findings.upsert(("shop", "p"), found)
        for _ in range(20):  # all of it happens in turns of this loop: no time has to pass
            await asyncio.sleep(0)
        assert all(told[:2] == ("shop", "p") for told in recorder.told)
        return [told[2] for told in recorder.told]

    try:
        assert await after(policy("10.0.0.0/8")) == []
        assert len(await after(policy("10.0.0.0/33"))) == 1
        assert len(await after(policy("10.0.0.0/33", "x"))) == 1  # the first one is known
        assert await after(policy("10.0.0.0/8")) == []
        assert len(await after(policy("10.0.0.0/33"))) == 1  # it came back
        assert await after(None) == []
        assert len(await after(policy("10.0.0.0/33"))) == 1
        assert len(await after(policy("10.0.0.0/33", uid="u2"))) == 1  # another object
    finally:
        task.cancel()


async def test_refused_conditions_are_tried_later_and_later_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fimbria.sources.k8s.retries.RETRY", 0.001)
    asked: dict[str, int] = {}
    refused = {"a", "b"}

    class Server:
        async def patch_status(self, _resource: Any, name: str, _patch: Any, namespace: str) -> None:
            asked[name] = asked.get(name, 0) + 1
            if name in refused:
                raise Forbidden(f"patch {namespace}/{name}", 403, text="no right")
            verdicts.upsert(("ns", name), Verdict(name, "ns", (), ("True", "Policy validation succeeded")))

    verdicts: Table[Any, Verdict] = Table("verdicts")
    for name in "abc":
        verdicts.upsert(("ns", name), Verdict(name, "ns", (), ("", "")))
    task = asyncio.create_task(PolicyStatusWriter(Server(), CILIUM_NETWORK_POLICIES, verdicts).run())  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(10):
            while min(asked.get(n, 0) for n in "ab") < 4:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
            warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
            assert len(warnings) == 2 and any("CiliumNetworkPolicy ns/a is not up to date" in w for w in warnings)
            assert asked["c"] == 1
            refused.clear()
            while any(v.current != v.wanted for v in verdicts.values()):  # noqa: ASYNC110
                await asyncio.sleep(0.002)
    finally:
        task.cancel()
