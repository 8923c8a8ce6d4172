"""Nodes of a lab on this machine: its API server runs no commands, the machine itself can."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import IO

from fimbria.cli.cluster import CantAsk
from fimbria.lab import components
from fimbria.lab.errors import LabError
from fimbria.lab.handle import Lab


class LabNodes:
    """A lab by its name. Raises CantAsk if there is none."""

    def __init__(self, name: str) -> None:
        try:
            self._lab = Lab(name)
        except LabError as error:
            raise CantAsk(str(error)) from None
        self.kubeconfig = self._lab.paths.host_kubeconfig

    async def dump(self, node: str, arguments: Sequence[str], sink: IO[bytes]) -> str:
        """Runs it in the node's namespaces. Raises OSError."""
        process = await asyncio.create_subprocess_exec(
            *self._lab.argv(f"node/{node}", "fimbria", "sysdump", *arguments),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=components.ENVIRONMENT,
        )  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        try:
            while piece := await process.stdout.read(1 << 16):
                sink.write(piece)
            errors = (await process.stderr.read(1 << 16)).decode(errors="replace").strip().splitlines()
            code = await process.wait()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        return "" if code == 0 else (errors[-1] if errors else f"exit status {code}")

    async def logs(self, node: str, add: Callable[[str, IO[bytes]], Awaitable[None]]) -> dict[str, str]:
        """Of the node's components."""
        missing: dict[str, str] = {}
        for path in self._paths(node):
            try:
                with path.open("rb") as file:
                    await add(path.name.removeprefix(f"{node}-"), file)
            except OSError as error:
                missing[path.name] = str(error)
        return missing

    def _paths(self, node: str) -> list[Path]:
        return sorted(self._lab.paths.logs.glob(f"{node}-*.log"))
