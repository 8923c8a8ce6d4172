"""Tells authors what became of their policies: the condition `Valid` of CiliumNetworkPolicy and its clusterwide kind,
Events about a NetworkPolicy, which has no status.

The agents act on the same conversion; the operator alone writes it down, so that thousands of nodes don't.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.model.policy import Problem
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.errors import ApiError, NotFound
from fimbria.sources.k8s.events import EventRecorder
from fimbria.sources.k8s.policies import Conversion, Vocabulary, network_policy
from fimbria.sources.k8s.policies_cilium import cilium_policy
from fimbria.sources.k8s.redirects import RedirectConversion
from fimbria.sources.k8s.resources import NETWORK_POLICIES, Resource
from fimbria.sources.k8s.retries import Retries
from fimbria.sources.k8s.timestamps import to_time
from fimbria.sources.k8s.types.meta import ObjectMeta
from fimbria.sources.k8s.types.networking import NetworkPolicy
from fimbria.tables.table import Signal, Table

log = logging.getLogger(__name__)
MAX_MESSAGE: Final = 4096


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the condition should say, and what it says now."""

    name: str
    namespace: str
    problems: tuple[Problem, ...]
    current: tuple[str, str]

    @property
    def wanted(self) -> tuple[str, str]:
        """Status and message."""
        if not self.problems:
            return "True", "Policy validation succeeded"
        return "False", "; ".join(map(str, self.problems))[:MAX_MESSAGE]


def judge(
    words: Vocabulary, convert: Callable[[Any, Vocabulary], Conversion | RedirectConversion] = cilium_policy
) -> Callable[[Any], Verdict]:
    """Converts an object and keeps only the outcome."""

    def transform(obj: Any) -> Verdict:
        conditions = [c for c in (obj.status.conditions or ()) if c.type == "Valid"] if obj.status else []
        current = (conditions[0].status, conditions[0].message) if conditions else ("", "")
        problems = convert(obj, words).problems
        return Verdict(obj.metadata.name, obj.metadata.namespace, problems, current)

    return transform


@dataclass(slots=True)
class PolicyStatusWriter:
    """Writes the condition for the objects of one kind."""

    client: ApiClient
    resource: Resource[Any]
    verdicts: Table[Any, Verdict]

    async def run(self) -> None:
        """Follow one kind until cancelled."""
        signal = Signal()
        subscription = self.verdicts.subscribe(signal)
        due: set[Any] = set()

        def again(key: Any) -> None:
            due.add(key)
            signal.set()

        retries = Retries[Any](again)
        while True:
            await signal.wait()
            signal.clear()
            keys = due | subscription.drain()
            due.clear()
            for key in keys:
                await self._policy(key, retries)

    async def _policy(self, key: Any, retries: Retries[Any]) -> None:
        verdict = self.verdicts.get(key)
        if verdict is None or verdict.current == verdict.wanted:
            retries.done(key)
            return
        try:
            await self._write(verdict)
        except NotFound:
            pass
        except ApiError as error:
            if retries.is_news(key, str(error)):
                name = f"{verdict.namespace}/{verdict.name}" if verdict.namespace else verdict.name
                log.warning("status of %s %s is not up to date: %s", self.resource.kind, name, error)
            retries.later(key)
            return
        retries.done(key)

    async def _write(self, verdict: Verdict) -> None:
        status, message = verdict.wanted
        condition = {
            "type": "Valid", "status": status, "reason": "" if status == "True" else "Unsupported",
            "message": message, "lastTransitionTime": to_time(time.time()),
        }  # fmt: skip
        patch = {"conditions": [condition]}
        await self.client.patch_status(self.resource, verdict.name, patch, verdict.namespace)


@dataclass(frozen=True, slots=True)
class Finding:
    """What is wrong with a NetworkPolicy; usually nothing."""

    name: str
    namespace: str
    uid: str
    problems: tuple[Problem, ...]


def inspect(words: Vocabulary) -> Callable[[NetworkPolicy], Finding]:
    """Converts an object and keeps only what is wrong with it."""

    def transform(obj: NetworkPolicy) -> Finding:
        meta = obj.metadata
        return Finding(meta.name, meta.namespace, meta.uid, network_policy(obj, words).problems)

    return transform


@dataclass(slots=True)
class NetworkPolicyEvents:
    """A Warning for each problem of a NetworkPolicy, when it appears. A new leader tells once more."""

    events: EventRecorder
    findings: Table[Any, Finding]
    _told: dict[Any, Finding] = field(default_factory=dict)

    async def run(self) -> None:
        """Follow until cancelled."""
        subscription = self.findings.subscribe()
        while True:
            self._tell(subscription.drain())
            await subscription.wait()

    def _tell(self, keys: Iterable[Any]) -> None:
        for key in keys:
            found = self.findings.get(key)
            before = self._told.pop(key, None)
            if found is None or not found.problems:
                continue
            self._told[key] = found
            known = before.problems if before is not None and before.uid == found.uid else ()
            meta = ObjectMeta(name=found.name, namespace=found.namespace, uid=found.uid)
            for problem in found.problems:
                if problem not in known:
                    self.events.emit(NETWORK_POLICIES, meta, "Warning", "NotEnforcedAsWritten", str(problem))
