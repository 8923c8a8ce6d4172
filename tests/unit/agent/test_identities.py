"""A running pod whose labels change."""

import asyncio
from typing import Any

import pytest

from fimbria.agent import identities
from fimbria.agent.identities import Identities
from fimbria.decide.identity import IdentitiesExhausted
from fimbria.model.endpoint import EndpointIdentity
from fimbria.model.labels import DEFAULT_FILTER, Labels
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
