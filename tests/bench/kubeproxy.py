"""The real kube-proxy in network namespaces of its own, following a lab's API server: the same objects as our agent.

Its node is a `Net` (see `baseline`): the member `host` routes between pods and runs kube-proxy; a cable of its own
leads to the lab's control plane, so that nothing it does passes through what is measured.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, TracebackType
from typing import Final

from tests.bench.baseline import Net
from tests.bench.measure import BenchError

from fimbria.lab import components, kernel
from fimbria.lab.handle import Lab

MODES: Final = ("iptables", "nftables")  # those that this kernel can do; "ipvs" needs another one
HOST: Final = "host"
IPTABLES: Final = tuple(f"{v}{s}" for v in ("iptables", "ip6tables") for s in ("", "-save", "-restore"))
BUILD: Final = Path(__file__).parents[1] / "kube/build.py"
METRICS: Final = 10249
PACE: Final = 0.02  # seconds
CALM: Final = 0.5
_CABLES = itertools.count()


def binary() -> Path:
    """kube-proxy itself, built if it isn't there yet. Raises BenchError."""
    spec = importlib.util.spec_from_file_location("fimbria_kube_build", BUILD)
    assert spec and spec.loader
    module: ModuleType = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    try:
        found: Path = module.ensure(["kube-proxy"]) / "kube-proxy"
    except module.BuildError as e:
        raise BenchError(str(e)) from None
    return found


def connect(net: Net, lab: Lab) -> None:
    """A cable between the lab's control plane and the member `host`. Raises LabError."""
    number = next(_CABLES)
    device, near, far = f"fimkp{number}", f"192.0.2.{4 * number + 1}", f"192.0.2.{4 * number + 2}"
    net.ip(HOST, f"link add ctl type veth peer name {device} netns {lab.paths.netns('control')}", "link set ctl up",
           f"address add {far}/30 dev ctl")  # fmt: skip
    lines = [f"link set {device} up", f"address add {near}/30 dev {device}"]
    kernel.ip_batch(lab.paths.netns_name("control"), lines)
    net.ip(HOST, f"route add {lab.spec.control.ipv4} via {near}")


class KubeProxy:
    """One kube-proxy process for as long as the context lasts. Its rules go with the namespace or with `flush`."""

    def __init__(self, net: Net, lab: Lab, mode: str, address: str) -> None:
        """`address`: the node's, whose node ports are served."""
        self.net, self.mode = net, mode
        self._lab, self._address = lab, address
        self._folder = TemporaryDirectory(prefix="fimbench-")
        self._process: subprocess.Popen[bytes] | None = None
        self.started = 0.0

    def __enter__(self) -> KubeProxy:
        tool, folder = binary(), Path(self._folder.name)
        config = folder / "config.json"
        config.write_text(json.dumps(self._config()))
        command = self.net.place(HOST).argv("setpriv", "--pdeathsig", "KILL", str(tool), f"--config={config}", "--v=2")
        self.started = time.monotonic()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(command, env=self._environment(), stdin=subprocess.DEVNULL, stdout=log,
                                             stderr=log)  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    @property
    def pid(self) -> int:
        """Of the process; `setpriv` and `nsenter` become it by exec."""
        assert self._process is not None
        return self._process.pid

    @property
    def _log(self) -> Path:
        return Path(self._folder.name) / "log"

    def log(self) -> str:
        """What it said so far."""
        return self._log.read_text(errors="replace")

    def check(self) -> None:
        """Raises BenchError if it has ended."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise BenchError(f"kube-proxy ({self.mode}) ended: {components.tail(self._log)}")

    def wait(self, works: Callable[[], object], patience: float) -> float:
        """Seconds from its start until `works` raises no BenchError any more. Raises BenchError if that takes longer
        than `patience` seconds."""
        while not succeeds(works):
            self.check()
            if time.monotonic() - self.started > patience:
                raise BenchError(f"kube-proxy ({self.mode}): not after {patience:.0f} s: {components.tail(self._log)}")
            time.sleep(PACE)
        return time.monotonic() - self.started

    def settle(self, patience: float) -> None:
        """Until it and what it runs use less than a tenth of a core for half a second, or patience ends."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            before = self.cpu()
            time.sleep(CALM)
            if self.cpu() - before < 0.1 * CALM and not self.busy():
                return

    def cpu(self) -> float:
        """CPU seconds of it and of the commands it has run so far (proc(5), stat, fields 14 to 17)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")

    def busy(self) -> bool:
        """Whether a command of it is running: `nft` and iptables-restore may take seconds."""
        tasks = Path(f"/proc/{self.pid}/task").glob("*/children")
        return any(children.read_text().strip() for children in tasks)

    def metric(self, name: str) -> float:
        """The sum of a metric's series (Prometheus text). Raises BenchError."""
        try:
            text = kernel.in_netns(self.net.path(HOST), partial(_get, f"http://127.0.0.1:{METRICS}/metrics"))
        except OSError as e:
            raise BenchError(f"kube-proxy ({self.mode}) gives no metrics: {e}") from None
        lines = [x for x in text.splitlines() if x.partition("{")[0].partition(" ")[0] == name]
        return sum(float(x.rpartition(" ")[2]) for x in lines)

    def _environment(self) -> dict[str, str]:
        """The legacy iptables first: Debian's nft-backed one is many times slower with many rules."""
        folder = Path(self._folder.name) / "bin"
        folder.mkdir()
        for name in IPTABLES:
            (folder / name).symlink_to(f"/usr/sbin/{name.replace('tables', 'tables-legacy', 1)}")
        return components.ENVIRONMENT | {"PATH": f"{folder}:{components.ENVIRONMENT['PATH']}"}

    def _config(self) -> dict[str, object]:
        """KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1), conntrack's settings left to the kernel."""
        times = ("tcpEstablishedTimeout", "tcpCloseWaitTimeout", "udpTimeout", "udpStreamTimeout")
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration", "mode": self.mode,
            "clientConnection": {"kubeconfig": str(self._lab.paths.kubeconfig), "contentType": "application/json"},
            "hostnameOverride": "node1", "clusterCIDR": self._lab.spec.ipv4_pool, "detectLocalMode": "ClusterCIDR",
            "bindAddress": self._address, "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": f"127.0.0.1:{METRICS}", "nodePortAddresses": [f"{self._address}/32"],
            "conntrack": {"maxPerCore": 0, "min": 0} | dict.fromkeys(times, "0s"),
        }  # fmt: skip


def succeeds(work: Callable[[], object]) -> bool:
    """Whether it raises no BenchError."""
    try:
        work()
    except BenchError:
        return False
    return True


def flush(net: Net) -> None:
    """Remove every rule that a kube-proxy which has ended left in a node. Raises BenchError."""
    script = (
        "for t in nat filter mangle; do iptables-legacy -t $t -F; iptables-legacy -t $t -X; done; nft flush ruleset"
    )
    net.place(HOST).run("sh", "-c", script, patience=120.0)


def _get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=5) as answer:
        body: bytes = answer.read()
    return body.decode()
