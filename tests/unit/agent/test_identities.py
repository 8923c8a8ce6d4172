"""A running pod whose labels change."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from fimbria.agent import identities
from fimbria.agent.identities import Identities
from fimbria.decide.identity import IdentitiesExhausted
from fimbria.model.endpoint import ClusterIdentity, EndpointIdentity
from fimbria.model.labels import DEFAULT_FILTER, Labels
from fimbria.sources.k8s.errors import Unavailable
from fimbria.tables import Tables


class FullAtFirst(Identities):
    """The first search finds no free number."""

    __slots__ = ("searches",)

    async def _number(self, labels: Labels) -> int:
        self.searches = getattr(self, "searches", 0) + 1
        if self.searches == 1:
            raise IdentitiesExhausted("no number is free")
        return 301


async def test_a_full_range_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identities, "RETRY", 0.001)
    monkeypatch.setattr(identities, "SETTLE", 0.001)
    tables, changed = Tables(), asyncio.get_running_loop().create_future()
    tables.endpoint_identities.upsert(7, EndpointIdentity(300, {"k8s:app": "old"}))
    client: Any = None
    made = FullAtFirst(client, tables, DEFAULT_FILTER)
    made.on_changed = lambda endpoint, identity: changed.set_result((endpoint, identity.number))
    made.labels_changed(7, {"k8s:app": "new"})
    assert await asyncio.wait_for(changed, 5) == (7, 301)


async def test_without_the_right_to_allocate_it_waits_for_the_operator() -> None:
    client: Any = None
    tables = Tables()
    made = Identities(client, tables, DEFAULT_FILTER, allocate=False, patience=5.0)
    following = asyncio.create_task(made.run())
    waiting = [asyncio.create_task(made.identify({"k8s:app": "web"})) for _ in range(3)]
    await asyncio.sleep(0.02)
    tables.identities.upsert(300, ClusterIdentity({"k8s:app": "other"}))
    await asyncio.sleep(0.02)
    assert not any(task.done() for task in waiting)
    tables.identities.upsert(301, ClusterIdentity({"k8s:app": "web"}, marked=True))
    found = await asyncio.wait_for(asyncio.gather(*waiting), 5)
    assert [identity.number for identity in found] == [301] * 3
    made.patience = 0.05
    with pytest.raises(Unavailable, match=r"the operator has not made it within 0.05 s.*k8s:app=never"):
        await made.identify({"k8s:app": "never"})
    following.cancel()


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not check():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


async def test_a_number_that_another_node_has_just_made_waits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The third nodes, and the maker's own programs, may not know it yet."""
    monkeypatch.setattr(identities, "SETTLE", 1.5)
    tables, changed = Tables(), []
    client: Any = None
    made = Identities(client, tables, DEFAULT_FILTER, on_changed=lambda _endpoint, i: changed.append(i.number))
    following = asyncio.create_task(made.run())
    tables.endpoint_identities.upsert(7, EndpointIdentity(300, {"k8s:app": "old"}))
    tables.identities.mark_synced()
    tables.identities.upsert(301, ClusterIdentity({"k8s:app": "new"}))
    await asyncio.sleep(0.02)
    made.labels_changed(7, {"k8s:app": "new"})
    await asyncio.sleep(0.1)
    assert changed == []
    await until(lambda: len(changed) > 0)
    assert changed == [301]
    made.labels_changed(7, {"k8s:app": "new"})
    tables.endpoint_identities.upsert(7, EndpointIdentity(300, {"k8s:app": "old"}))
    made.labels_changed(7, {"k8s:app": "new"})
    began = asyncio.get_running_loop().time()
    await until(lambda: len(changed) > 1)
    assert changed == [301, 301]
    assert asyncio.get_running_loop().time() - began < identities.SETTLE, "it is known by now"
    following.cancel()
