"""One identity for each set of labels, however many nodes ask at once, on both API servers."""

import asyncio
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest

from fimbria.decide.identity import probe
from fimbria.model.labels import Labels

sys.path.insert(0, str(Path(__file__).parent))
import allocators
from allocators import Storm


def run(server: Any, nodes: int, sets: int, *, crowded: bool = False, spreading: bool = True) -> Storm:
    async def go() -> Storm:
        async with allocators.open_client(server.kubeconfig) as client:
            await allocators.install(client)
            wanted = allocators.label_sets(sets, uuid.uuid4().hex[:6])
            if crowded:
                await allocators.occupy(client, wanted)
            found = await allocators.storm(client, nodes, wanted, spreading=spreading)
            assert not [labels for labels in await allocators.duplicates(client) if labels in wanted]
            return found

    return asyncio.run(go())


def check(found: Storm, sets: int) -> None:
    assert len(found.numbers) == sets
    assert all(len(numbers) == 1 for numbers in found.numbers.values())


@pytest.mark.parametrize("spreading", [True, False])
def test_all_nodes_get_one_number(server: Any, spreading: bool) -> None:
    found = run(server, 200, 3, spreading=spreading)
    check(found, 3)
    # who spreads looks first; on a slow machine all may look, create and look again
    assert sum(found.sent.values()) <= 3 * 200 * (3 if spreading else 2)


def test_where_others_have_the_first_number(server: Any) -> None:
    """Everybody goes on to the second one, and keeps the collector from taking the first away."""
    found = run(server, 60, 4, crowded=True)
    check(found, 4)
    second = {labels: list(_first(labels, 2)) for labels in found.numbers}
    assert all(numbers == {second[labels][1]} for labels, numbers in found.numbers.items())


def _first(labels: Labels, count: int) -> list[int]:
    numbers = probe(labels)
    return [next(numbers) for _ in range(count)]
