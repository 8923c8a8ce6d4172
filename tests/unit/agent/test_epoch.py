"""The policy epoch as the kernel gets it."""

import asyncio
import threading

from fimbria.agent.epoch import LAST, Epoch, following


def test_never_zero() -> None:
    assert following(LAST) == 1
    assert following(0) == 1
    assert following(LAST - 1) == LAST


def test_a_start_never_keeps_the_epoch_it_finds() -> None:
    written: list[int] = []
    Epoch(written.append, lambda: None).restore(41)
    assert written == [42]


def test_a_new_map_starts_anywhere_but_at_zero() -> None:
    written: list[int] = []
    for _ in range(50):
        Epoch(written.append, lambda: None).restore(0)
    assert 0 not in written
    assert len(set(written)) > 40


async def test_each_bump_is_followed_by_one_after_a_grace_period() -> None:
    written: list[int] = []
    entered, leave = threading.Event(), threading.Event()

    def grace() -> None:
        entered.set()
        assert leave.wait(5)

    epoch = Epoch(written.append, grace, value=10)
    task = asyncio.create_task(epoch.run())
    try:
        epoch.bump()
        assert written == [11]  # at once
        await asyncio.to_thread(entered.wait, 5)
        assert written == [11]
        # Rows written during a grace period aren't covered by it.
        entered.clear()
        epoch.bump()
        assert written == [11, 12]
        leave.set()
        await asyncio.to_thread(entered.wait, 5)
        async with asyncio.timeout(10):
            while len(written) < 4:  # noqa: ASYNC110 - what is waited for has no event
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert written == [11, 12, 13, 14]
    finally:
        task.cancel()
