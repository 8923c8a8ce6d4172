"""A node: its first process, containerd and kubelet; started, stopped and started again with its disk kept."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.bed import cgroups, config, network, pki, processes
from tests.cluster.bed.boot import BINARIES
from tests.cluster.bed.errors import BedError
from tests.cluster.bed.layout import REPOSITORY, STARTUP_TAINT, Addresses, Layout, addresses, node_number

INIT, CONTAINERD, KUBELET = "init", "containerd", "kubelet"
PLUGINS = Path("/usr/lib/cni")  # Debian's containernetworking-plugins


@dataclass(frozen=True)
class NodeHost:
    """The machine's side of a node. `binaries` is where kubelet is."""

    layout: Layout
    name: str
    binaries: Path

    @property
    def pid(self) -> int:
        """Of the node's first process. Raises BedError if the node doesn't run."""
        found = processes.running(self.layout, self.name, INIT)
        if not found:
            raise BedError(f"{self.name} of cluster {self.layout.name} isn't running")
        return found.pid

    @property
    def booted(self) -> bool:
        return processes.running(self.layout, self.name, INIT) is not None

    def boot(self, taints: tuple[str, ...] = (STARTUP_TAINT,)) -> None:
        """Namespaces, disk and first process; nothing if they are there."""
        if self.booted:
            return
        cgroups.kill(self.layout, self.name)  # what a start that was interrupted left
        cgroups.ensure(self.layout, self.name)
        network.ensure_member(self.layout, self.name)
        pki.ensure_node(self.layout, node_number(self.name))
        self._furnish(taints)
        env = processes.environment(PYTHONPATH=os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)]))
        command = [sys.executable, "-m", "tests.cluster.bed.boot", self.layout.name, self.name, str(self.binaries)]
        processes.record(self.layout, self.name, INIT, int(processes.run(command, env=env)))

    def _furnish(self, taints: tuple[str, ...]) -> None:
        """What an installer puts on a node's disk. Its CNI folders are empty but for the reference plugins."""
        upper = self.layout.disk(self.name) / "upper"
        kubernetes = upper / config.KUBERNETES.lstrip("/")
        for folder in (
            kubernetes / "manifests",
            kubernetes / "pki",
            upper / "etc/cni/net.d",
            upper / "opt/cni/bin",
            upper / "var/log/pods",
        ):
            folder.mkdir(parents=True, exist_ok=True)
        keys = self.layout.pki
        for source, target in (
            ("ca.crt", "ca.crt"),
            (f"{self.name}.crt", "kubelet.crt"),
            (f"{self.name}.key", "kubelet.key"),
        ):
            shutil.copy2(keys / source, kubernetes / "pki" / target)
        pki.write_private(kubernetes / "kubelet.conf", pki.kubeconfig(keys, self.name))
        settings = config.kubelet(self.layout.cgroup_of(self.name), taints)
        (kubernetes / "kubelet.json").write_text(json.dumps(settings, indent=1))
        (kubernetes / "containerd.toml").write_text(config.containerd())
        (upper / "etc/resolv.conf").unlink(missing_ok=True)
        (upper / "etc/resolv.conf").write_text("nameserver 10.99.0.1\n")
        if not (plugin := upper / "opt/cni/bin/loopback").exists() and PLUGINS.is_dir():
            shutil.copytree(PLUGINS, plugin.parent, dirs_exist_ok=True)
        for process in (INIT, CONTAINERD, KUBELET):
            link = self.layout.log(process, self.name)
            link.unlink(missing_ok=True)
            link.symlink_to(upper / f"var/log/{process}.log")

    def enter(self) -> list[str]:
        return processes.enter(self.layout, self.name, self.pid)

    def start_containerd(self) -> None:
        """Returns when kubelet can use it."""
        command = ["containerd", "--config", f"{config.KUBERNETES}/containerd.toml"]
        self._start(CONTAINERD, command)

        def serves() -> bool:
            # its socket answers earlier, but kubelet gives up for good if its part for Kubernetes isn't ready
            self._alive(CONTAINERD)
            log = self.layout.log(CONTAINERD, self.name).read_text(errors="replace")
            return log.rfind('msg="Start streaming server"') > log.rfind('msg="starting containerd"')

        processes.wait(
            f"{self.name}: containerd", serves, 60, lambda: processes.tail(self.layout, self.name, CONTAINERD)
        )

    def start_kubelet(self, at: Addresses | None = None) -> None:
        """`at`: the node's addresses, if they aren't those it was made with."""
        at = at or addresses(self.name)
        self._start(
            KUBELET,
            [
                f"{BINARIES}/kubelet",
                f"--config={config.KUBERNETES}/kubelet.json",
                f"--kubeconfig={config.KUBERNETES}/kubelet.conf",
                f"--hostname-override={self.name}",
                f"--node-ip={at.ipv4},{at.ipv6}",
            ],
        )

    def check(self) -> None:
        """Raises BedError if containerd or kubelet has ended."""
        for process in (CONTAINERD, KUBELET):
            self._alive(process)

    def stop(self) -> None:
        """As by pulling its plug: processes, memory, network and mounts are gone at once; its disk stays."""
        cgroups.kill(self.layout, self.name)
        network.remove(self.layout, self.name)
        for process in (INIT, CONTAINERD, KUBELET):
            self.layout.pid_file(process, self.name).unlink(missing_ok=True)

    def _start(self, process: str, command: list[str]) -> None:
        path = f"{BINARIES}:{processes.PATH}"
        env = processes.environment() | {"PATH": path}
        log = Path(f"/var/log/{process}.log")
        processes.start(self.layout, self.name, process, command, pid=self.pid, log=log, env=env)

    def _alive(self, process: str) -> None:
        if not processes.running(self.layout, self.name, process):
            raise BedError(f"{self.name}: {process} has ended{processes.tail(self.layout, self.name, process)}")
