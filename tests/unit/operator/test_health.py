"""The operator's ports, over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fimbria.operator.health import OperatorHealth


class Replica:
    def __init__(self) -> None:
        self.alive, self.ready, self.warning = "", "nobody is known to hold the lease yet", ""
        self._kept: list[socket.socket] = []
        self.probes, self.scrapes = self.free_port(), self.free_port()

    def free_port(self) -> int:
        """Nobody else's meanwhile: a socket stays bound to it, which is in no listener's way that shares addresses."""
        keeper = socket.socket()
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        self._kept.append(keeper)
        return int(keeper.getsockname()[1])

    def close(self) -> None:
        for keeper in self._kept:
            keeper.close()


@asynccontextmanager
async def serving(replica: Replica) -> AsyncIterator[None]:
    health = OperatorHealth(
        lambda: replica.alive, lambda: replica.ready, lambda: b"fimbria_operator_leading 1.0\n",
        f"127.0.0.1:{replica.probes}", f"127.0.0.1:{replica.scrapes}", lambda: replica.warning,
    )  # fmt: skip
    task = asyncio.create_task(health.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        replica.close()


async def ask(port: int, path: str) -> tuple[int, str]:
    async with asyncio.timeout(30):
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except OSError:
                await asyncio.sleep(0.01)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), body.decode()


async def test_probes_and_metrics() -> None:
    replica = Replica()
    async with serving(replica):
        assert await ask(replica.probes, "/livez") == (200, "ok\n")
        assert await ask(replica.probes, "/readyz") == (503, "nobody is known to hold the lease yet\n")
        replica.ready = ""
        assert await ask(replica.probes, "/readyz") == (200, "ok\n")
        replica.warning = "80 % are in use"
        assert await ask(replica.probes, "/readyz") == (200, "ok\nwarning: 80 % are in use\n")
        replica.alive = "the lease is overdue"
        assert [(await ask(replica.probes, p))[0] for p in ("/livez", "/healthz", "/readyz")] == [503, 503, 503]
        assert await ask(replica.scrapes, "/metrics") == (200, "fimbria_operator_leading 1.0\n")
        assert (await ask(replica.probes, "/metrics"))[0] == (await ask(replica.scrapes, "/livez"))[0] == 404


async def test_one_port_for_both() -> None:
    replica = Replica()
    replica.scrapes = replica.probes
    async with serving(replica):
        assert (await ask(replica.probes, "/livez"))[0] == (await ask(replica.probes, "/metrics"))[0] == 200
