"""Pods made by the bench itself through the real CNI shim, in network namespaces without names."""

from __future__ import annotations

import os
import resource
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from tests.bench import baseline
from tests.bench.cni import POD, bridge, run_once
from tests.bench.labs import cni_socket

from fimbria.lab import kernel
from fimbria.lab.handle import Lab

AT_ONCE: Final = 8


class Pods:
    """Pods whose network namespaces only we hold, by descriptors: if we die, the kernel removes them."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._socket = cni_socket(lab, "node1")
        self._namespaces: list[int] = []
        self._uid = ""

    def __enter__(self) -> Pods:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # a descriptor a namespace
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        self._lab.apply(POD)
        self._uid = self._lab.pod("bench")["metadata"]["uid"]
        return self

    def __exit__(self, *_: object) -> None:
        for fd in self._namespaces:
            os.close(fd)

    def grow(self, size: int) -> list[float]:
        """Add pods until there are `size`; returns pods per second, in tenths of what was to do."""
        first = len(self._namespaces)
        self._namespaces += [new_namespace() for _ in range(size - first)]
        step = max((size - first) // 10, 1)
        rates = []
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for start in range(first, size, step):
                part = range(start, min(start + step, size))
                began = time.monotonic()
                list(pool.map(lambda n: self._call("ADD", n), part))
                rates.append(len(part) / (time.monotonic() - began))
        return rates

    def shrink(self) -> float:
        """Remove all; returns pods per second."""
        count, began = len(self._namespaces), time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda n: self._call("DEL", n), range(count)))
        return count / (time.monotonic() - began)

    def _call(self, command: str, number: int) -> float:
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=bench;K8S_POD_UID={self._uid}"
        return call_shim(self._socket, command, f"fimbench-pod{number}", self._namespaces[number], args)


def bridge_rates(size: int) -> list[float]:
    """Pods per second that Debian's bridge plugin adds in a node of its own, in tenths of `size`."""
    step = max(size // 10, 1)
    rates, namespaces = [], [new_namespace() for _ in range(size)]
    with baseline.net("crowd") as net, TemporaryDirectory(prefix="fimbench-") as data:
        net.add("host", baseline.HOST)
        plugin = bridge(data, lambda work: work())
        enter = (net.path("host"), kernel.CLONE_NEWNET)

        def add(number: int) -> float:
            return plugin.call("ADD", f"fimbench-{number}", fd_path(namespaces[number]), "")

        try:
            with ThreadPoolExecutor(AT_ONCE, initializer=kernel.setns, initargs=enter) as pool:
                for start in range(0, size, step):
                    part = range(start, min(start + step, size))
                    began = time.monotonic()
                    list(pool.map(add, part))
                    rates.append(len(part) / (time.monotonic() - began))
        finally:
            for fd in namespaces:
                os.close(fd)
    return rates


def fd_path(fd: int) -> Path:
    """A path to an open descriptor of ours that other processes can open."""
    return Path(f"/proc/{os.getpid()}/fd/{fd}")


def new_namespace() -> int:
    """A descriptor of a new network namespace that has no name anywhere."""

    def make() -> int:
        kernel.unshare(kernel.CLONE_NEWNET)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    with ThreadPoolExecutor(1) as pool:  # the thread ends with the namespace still its own
        return pool.submit(make).result()


def call_shim(socket: Path, command: str, container: str, netns: int, args: str) -> float:
    """One CNI call of ours for a namespace known by descriptor; ms. Raises BenchError."""
    env = {
        "CNI_COMMAND": command, "CNI_CONTAINERID": container, "CNI_NETNS": str(fd_path(netns)),
        "CNI_IFNAME": "eth0", "CNI_ARGS": args, "CNI_PATH": "/", "FIMBRIA_CNI_SOCKET": str(socket),
    }  # fmt: skip
    config = b'{"cniVersion":"1.0.0","name":"fimbria","type":"fimbria-cni"}'
    return run_once(kernel.binary("fimbria-cni"), env, config)
