"""Readiness probes, made from the node as kubelet makes them: packets come from the host, not from inside the pod."""

import asyncio
import contextlib

from fimbria.lab.runner import containers
from fimbria.lab.runner.containers import Running
from fimbria.lab.runner.spec import Probe


async def succeeds(probe: Probe, address: str, running: Running) -> bool:
    """One attempt. `address` is the pod's primary address."""
    if probe.kind == "exec":
        return await containers.execute(running, probe.command, probe.timeout) == 0
    try:
        async with asyncio.timeout(probe.timeout):
            return await (_http(probe, address) if probe.kind == "http" else _tcp(probe, address))
    except (TimeoutError, OSError, asyncio.IncompleteReadError, ValueError):
        return False


async def _tcp(probe: Probe, address: str) -> bool:
    _, writer = await asyncio.open_connection(address, probe.port)
    writer.close()
    return True


async def _http(probe: Probe, address: str) -> bool:
    """Any status from 200 to 399 is success."""
    reader, writer = await asyncio.open_connection(address, probe.port)
    try:
        host = f"[{address}]" if ":" in address else address
        writer.write(f"GET {probe.path} HTTP/1.1\r\nHost: {host}:{probe.port}\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        line = await reader.readuntil(b"\n")
        fields = line.split()
        return len(fields) >= 2 and fields[0].startswith(b"HTTP/") and 200 <= int(fields[1]) < 400
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


class Judge:
    """Counts a probe's outcomes: ready after `successes` in a row, not ready after `failures` in a row."""

    def __init__(self, probe: Probe) -> None:
        self._probe = probe
        self._streak = 0
        self.ready = False

    def feed(self, success: bool) -> bool:
        """True if readiness changed."""
        if success == self.ready:
            self._streak = 0
            return False
        self._streak += 1
        if self._streak < (self._probe.successes if success else self._probe.failures):
            return False
        self.ready, self._streak = success, 0
        return True
