"""How soon a policy is enforced: from just before the request to the API server until the first packet that is treated
as the policy says, seen by one UDP echo a millisecond between two pods."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Final

from tests.bench.labs import cni_socket
from tests.bench.measure import BenchError
from tests.bench.pods import call_shim, new_namespace

from fimbria.lab import components, kernel
from fimbria.lab.handle import Lab
from fimbria.lab.objects import Objects
from fimbria.sources.k8s import config

PORT: Final = 9001
PACE: Final = 0.001
DENIED, ALLOWED = "applied until it denies", "deleted until all is allowed"
PATH: Final = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"
# Selects half of the large cluster's identities, and never the client.
POLICY: Final = {
    "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "bench"},
    "spec": {
        "podSelector": {"matchLabels": {"app": "enforce-server"}},
        "ingress": [{"from": [{"namespaceSelector": {},
                               "podSelector": {"matchExpressions": [
                                   {"key": "tier", "operator": "In", "values": ["even"]}]}}]}],
    },
}  # fmt: skip
PODS: Final = """
apiVersion: v1
kind: Pod
metadata: {name: enforce-ROLE, labels: {app: enforce-ROLE}}
spec: {nodeName: node1, containers: [{name: main, image: fimbria/labtool, command: [labtool, sleep]}]}
"""


class Stream(threading.Thread):
    """Sends a numbered datagram a millisecond and remembers when, and which were answered."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(daemon=True)
        self._sock = sock
        self.sent: list[float] = []
        self.answered = bytearray()
        self.last_answer = -1
        self.stopped = False

    def run(self) -> None:
        """Until `stopped`."""
        self._sock.setblocking(False)
        following = time.monotonic()
        while not self.stopped:
            self._send()
            following = max(following + PACE, time.monotonic())
            while (left := following - time.monotonic()) > 0:
                if select.select([self._sock], [], [], left)[0]:
                    self._receive()

    def _send(self) -> None:
        number = len(self.sent)
        self.answered.append(0)
        self.sent.append(time.monotonic())
        try:
            self._sock.send(number.to_bytes(8, "big"))
        except OSError:
            return  # an ICMP error of an earlier one

    def _receive(self) -> None:
        try:
            number = int.from_bytes(self._sock.recv(64), "big")
        except OSError:
            return
        self.answered[number] = 1
        self.last_answer = max(self.last_answer, number)

    def first_denied(self) -> float:
        """When the first of the packets was sent that are not answered any more."""
        return self.sent[self.last_answer + 1]

    def first_allowed(self, since: int) -> float | None:
        """When the first packet from number `since` on was sent that was answered."""
        found = self.answered.find(1, since)
        return self.sent[found] if found >= 0 else None


class Enforcement:
    """Two pods of one node with a stream between them, for as long as the context lasts."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._namespaces: dict[str, int] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._stream: Stream | None = None

    def __enter__(self) -> Enforcement:
        address = ""
        for role in ("client", "server"):
            self._lab.apply(PODS.replace("ROLE", role))
            uid = self._lab.pod(f"enforce-{role}")["metadata"]["uid"]
            args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=enforce-{role};K8S_POD_UID={uid}"
            netns = self._namespaces[role] = new_namespace()
            call_shim(cni_socket(self._lab, "node1"), "ADD", f"fimbench-{role}", netns, args)
            address = _address(netns)
        inside = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{self._namespaces['server']}", "--"]
        tool = [kernel.binary("labtool"), "serve", "--udp", str(PORT)]
        self._server = subprocess.Popen([*inside, *tool], env=components.ENVIRONMENT, stdin=subprocess.DEVNULL)
        self._stream = Stream(_udp(self._namespaces["client"], address))
        self._stream.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._stream is not None:
            self._stream.stopped = True
            self._stream.join()
        if self._server is not None:
            self._server.kill()
            self._server.wait()
        for fd in self._namespaces.values():
            os.close(fd)

    def measure(self, times: int) -> dict[str, list[float]]:
        """Milliseconds of each time, of both directions. Raises BenchError if a policy isn't enforced in 5 s."""
        return asyncio.run(self._measure(times))

    async def _measure(self, times: int) -> dict[str, list[float]]:
        samples: dict[str, list[float]] = {DENIED: [], ALLOWED: []}
        cluster = config.load(self._lab.paths.host_kubeconfig)
        async with Objects(cluster, component="bench", rate=1000, burst=1000) as client:
            await client.request("GET", PATH)  # the connection is there before the clock runs
            for _ in range(times):
                samples[DENIED].append(await self._deny(client))
                samples[ALLOWED].append(await self._allow(client))
        return samples

    async def _deny(self, client: Objects) -> float:
        stream = self._flowing()
        began = time.monotonic()
        await client.request("POST", PATH, POLICY)
        # Silence for that long is no hiccup: the machine is busy, but 50 answers in a row are not late.
        while len(stream.sent) - stream.last_answer < 50:
            await asyncio.sleep(0.005)
            if time.monotonic() - began > 5:
                raise BenchError("a policy isn't enforced after 5 s")
        return (stream.first_denied() - began) * 1000

    async def _allow(self, client: Objects) -> float:
        stream = self._flowing(expect=False)
        since, began = len(stream.sent), time.monotonic()
        await client.request("DELETE", f"{PATH}/bench")
        while (allowed := stream.first_allowed(since)) is None or len(stream.sent) - stream.last_answer > 20:
            await asyncio.sleep(0.005)
            if time.monotonic() - began > 5:
                raise BenchError("traffic isn't allowed 5 s after the policy is gone")
        await asyncio.sleep(0.02)
        return (allowed - began) * 1000

    def _flowing(self, expect: bool = True) -> Stream:
        assert self._stream is not None
        deadline = time.monotonic() + 5
        while expect and len(self._stream.sent) - self._stream.last_answer > 10:
            if time.monotonic() > deadline:
                raise BenchError("the stream between the pods doesn't flow")
            time.sleep(0.005)
        return self._stream


def _address(netns: int) -> str:
    """The pod's IPv4 address. Raises BenchError."""
    argv = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{netns}", "--", "ip", "-o", "-4", "address", "show", "eth0"]
    words = subprocess.run(argv, capture_output=True, text=True, check=True).stdout.split()
    if "inet" not in words:
        raise BenchError("the pod has no IPv4 address")
    return words[words.index("inet") + 1].partition("/")[0]


def _udp(netns: int, address: str) -> socket.socket:
    """A socket of the pod, connected to the server."""
    sock: list[socket.socket] = []

    def make() -> None:
        kernel.setns(Path(f"/proc/self/fd/{netns}"), kernel.CLONE_NEWNET)
        sock.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not sock:
        raise BenchError("can't enter the pod's namespace")
    sock[0].connect((address, PORT))
    return sock[0]
