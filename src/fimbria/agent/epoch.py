"""The policy epoch: connections whose verdict bears an older one are judged again at their next packet.

Why no verdict from old rows stays
1. A program notes the epoch before it looks up any row. So a verdict from rows before a change bears the epoch before
   it, and falls with the bump that follows the change (`bump`, after all rows of a pass).
2. A CPU with weak ordering may load the row before the epoch all the same, and find the old row and the new epoch. Such
   a program began before the change: when all of those have ended the epoch is bumped once more (`run`).
3. An agent that dies between the two leaves new rows and the old epoch. So each start bumps before it writes anything,
   and again after its first pass, whether that changed anything or not (`restore`, and the agent's first `bump`).
4. If `runtime` is a new map and connections come from a former version, the epoch starts at a random number and is
   written before any new program runs. It is never 0, under which programs trust no verdict.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

LAST: Final = 0xFFFFFFFF


def following(epoch: int) -> int:
    """The epoch after this one: 1..2^32-1, in a circle."""
    return epoch % LAST + 1


@dataclass(slots=True)
class Epoch:
    """`write` puts the number into the kernel; `grace` blocks until all programs that run now have ended."""

    write: Callable[[int], None]
    grace: Callable[[], None]
    value: int = 0
    _due: asyncio.Event = field(default_factory=asyncio.Event)

    def restore(self, kernel: int) -> None:
        """Go on from what the kernel has; 0 is a new map. Call before new programs are attached. Raises OSError."""
        self.value = kernel or secrets.randbelow(LAST) + 1
        self._advance()

    def bump(self) -> None:
        """Rows that could turn a verdict have been written. Raises OSError."""
        self._advance()
        self._due.set()

    async def run(self) -> None:
        """Follow every bump with a second one, until cancelled. Raises OSError."""
        while True:
            await self._due.wait()
            self._due.clear()
            await asyncio.to_thread(self.grace)
            self._advance()

    def _advance(self) -> None:
        self.value = following(self.value)
        self.write(self.value)
