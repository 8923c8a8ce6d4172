"""The handle on one cluster: brought up, asked, broken, taken down."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

from tests.cluster.bed import cgroups, control, inotify, install, network, pki, processes
from tests.cluster.bed.errors import BedError
from tests.cluster.bed.handle import COMMAND_SECONDS, Node
from tests.cluster.bed.images import load, marks, prepare
from tests.cluster.bed.layout import DEFAULT_NAME, DISKS, NETNS, STARTUP_TAINT, STATE, Layout, node_name, node_number
from tests.cluster.bed.node import NodeHost
from tests.cluster.bed.progress import say, step
from tests.cluster.bed.store import Store
from tests.cluster.images.build import ImageError, cache_dir
from tests.cluster.images.build import ensure as build_images
from tests.cluster.images.recipes import kube, recipes

from fimbria.lab import kernel

TOOLS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kubectl", "helm")


class Cluster:
    """One cluster of this machine, running or not."""

    def __init__(self, name: str = DEFAULT_NAME):
        self.layout = Layout(name)
        self.name = name

    # --- up and down ---

    def up(
        self, nodes: int = 2, taints: tuple[str, ...] = (STARTUP_TAINT,), images: Mapping[str, Path] | None = None
    ) -> None:
        """Brings up what isn't up yet: the control plane, `nodes` nodes, the world outside. Nodes have the bed's images
        and those given (archives by name), are registered when this returns, and not Ready before a network is
        installed. Raises BedError."""
        wanted = [self._host(node_name(number)) for number in range(1, nodes + 1)]
        self._prepare()
        with self.locked():
            self._check_room(wanted)
            with step("certificates and networks"):
                pki.ensure(self.layout)
                for member in ("control", "world"):
                    cgroups.ensure(self.layout, member)
                network.ensure_control(self.layout)
                network.ensure_member(self.layout, "world")
            with ThreadPoolExecutor(len(wanted) + 1) as pool:
                work = [pool.submit(self._start_control)]
                archives = self._stock(images or {})
                work += [pool.submit(self._start_host, host, taints, archives) for host in wanted]
                for one in work:
                    one.result()
            for host in wanted:
                host.start_kubelet()
            with step(f"{len(wanted)} nodes registered"):
                self._wait_registered(wanted)

    def load_images(self, *names: str) -> None:
        """Builds those images (tests.cluster.images) where they are outdated, and gives them to the nodes that run."""
        self._load(built(*names))

    def up_with_fimbria(self, nodes: int = 2) -> None:
        """Brings up what isn't up yet, Fimbria by its chart and the cluster's DNS too. Raises BedError."""
        image = built(install.IMAGE)
        self.up(nodes, images=image)
        self._load(image)
        install.fimbria(self, image[install.IMAGE], {})
        self.install_dns()

    def install_fimbria(self, values: Mapping[str, Any] | None = None, chart: Path = install.CHART) -> None:
        """Installs or upgrades Fimbria from this tree by its chart; `values` are merged over the bed's own. Returns
        when nodes are Ready without the startup taint. Raises BedError."""
        image = built(install.IMAGE)
        self._load(image)
        install.fimbria(self, image[install.IMAGE], values or {}, chart)

    def install_dns(self) -> None:
        """The cluster's DNS; returns when pods on every node get answers."""
        install.dns(self)

    def down(self) -> None:
        """Ends every process and removes every trace, also of a cluster that was never complete."""
        with self.locked(create=False):
            cgroups.kill(self.layout)
            network.remove_all(self.layout)
            shutil.rmtree(self.layout.disks, ignore_errors=True)
            shutil.rmtree(self.layout.state, ignore_errors=True)
        for parent in (DISKS, STATE):
            with contextlib.suppress(OSError):
                parent.rmdir()

    def add_node(self, taints: tuple[str, ...] = (STARTUP_TAINT,)) -> Node:
        """One more, with the lowest number that is free; registered when this returns."""
        number = next(n for n in range(1, 100) if node_name(n) not in self.nodes())
        host = self._host(node_name(number))
        with self.locked():
            self._check_room([host])
            self._start_host(host, taints, self._stock({}))
            host.start_kubelet()
            self._wait_registered([host])
        return Node(host)

    def remove_node(self, name: str) -> None:
        """Stops it and removes its disk. The Node object is the caller's to delete."""
        host = self._host(name)
        with self.locked():
            host.stop()
            shutil.rmtree(self.layout.disk(name), ignore_errors=True)

    @contextlib.contextmanager
    def locked(self, create: bool = True) -> Iterator[None]:
        """One change at a time. The lock is on the state folder itself, so that none is left behind."""
        if create:
            self.layout.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            handle = os.open(self.layout.state, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    # --- what is there ---

    def remains(self) -> list[str]:
        """Every trace of the cluster on this machine, as paths and names."""
        folders = [str(path) for path in (self.layout.state, self.layout.disks) if path.exists()]
        mounts = [str(p) for p in kernel.mount_points(Path("/")) if self.layout.disks in p.parents]
        return [*folders, *mounts, *map(str, cgroups.present(self.layout)), *network.present(self.layout)]

    def installed(self) -> bool:
        """Nodes are there, Ready and take pods, and the cluster's DNS is up: what `up` and `install_...` lead to."""
        if not processes.running(self.layout, "control", control.API):
            return False
        try:
            return bool(self.nodes()) and not install.unready(self) and install.dns_ready(self)
        except BedError:
            return False

    def nodes(self) -> list[str]:
        """Names of those that have a disk, running or not."""
        found = [p.name for p in self.layout.disks.glob("node*")] if self.layout.disks.exists() else []
        return sorted(found, key=node_number)

    def node(self, name: str) -> Node:
        """Raises BedError if the cluster has no such node."""
        if name not in self.nodes():
            raise BedError(f"cluster {self.name} has no {name}; it has {', '.join(self.nodes()) or 'none'}")
        return Node(self._host(name))

    # --- asking ---

    def kubectl(self, *arguments: str, stdin: str = "", seconds: float = COMMAND_SECONDS) -> str:
        """Its output. Raises BedError with what it said if it failed."""
        return self.control(["kubectl", *arguments], stdin=stdin, seconds=seconds)

    def get(self, *arguments: str) -> Any:
        """`kubectl get` as parsed JSON."""
        return json.loads(self.kubectl("get", *arguments, "-o", "json"))

    def helm(self, *arguments: str, seconds: float = 300) -> str:
        return self.control(["helm", *arguments], seconds=seconds)

    def control(self, command: Sequence[str], *, stdin: str = "", seconds: float = COMMAND_SECONDS) -> str:
        """Runs in the control plane's network with the administrator's kubeconfig."""
        return processes.run(
            [*self.enter("control"), "--", *command], stdin=stdin, env=self.control_env, seconds=seconds
        )

    def world(self, command: Sequence[str], *, stdin: str = "", seconds: float = COMMAND_SECONDS) -> str:
        """Runs outside the cluster, at 10.99.0.100 and fd00:10:99::100."""
        return processes.run(
            [*self.enter("world"), "--", *command], stdin=stdin, env=processes.environment(), seconds=seconds
        )

    def enter(self, member: str) -> list[str]:
        """The beginning of a command that runs in `control`, `world` or a node."""
        if not self.layout.netns_path("control").exists():
            raise BedError(f"there is no cluster {self.name}: `python -m tests.cluster.bed up --name {self.name}`")
        return (
            processes.enter(self.layout, member) if member in ("control", "world") else self.node(member).host.enter()
        )

    @property
    def control_env(self) -> dict[str, str]:
        home = self.layout.state / "home"
        home.mkdir(mode=0o700, exist_ok=True)
        path = f"{self.binaries}:{processes.PATH}"
        return processes.environment(KUBECONFIG=str(self.layout.kubeconfig)) | {"PATH": path, "HOME": str(home)}

    # --- the API server, alone ---

    def stop_api(self) -> None:
        """etcd goes on."""
        processes.stop(self.layout, "control", control.API)

    def start_api(self) -> None:
        control.start_api(self.layout, self.binaries)
        control.wait_ready(self.layout, self.binaries)

    # --- parts ---

    @cached_property
    def binaries(self) -> Path:
        """Folder of the Go programs, built if need be."""
        try:
            found: Path = kube.ensure(TOOLS)
        except kube.BuildError as error:
            raise BedError(str(error)) from None
        return found

    def _host(self, name: str) -> NodeHost:
        node_number(name)
        return NodeHost(self.layout, name, self.binaries)

    def _prepare(self) -> None:
        if os.geteuid() != 0:
            raise BedError("a cluster needs root: namespaces, mounts and cgroups")
        for tool in ("containerd", "runc", "ctr", "openssl", "ip"):
            if not shutil.which(tool, path=processes.PATH):
                raise BedError(f"{tool} is missing: scripts/setup --test installs what is needed")
        cgroups.check()
        with step("programs"):
            say(f"from {self.binaries}")
        for folder in (STATE, self.layout.state, DISKS, self.layout.disks, self.layout.logs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def _check_room(self, hosts: Sequence[NodeHost]) -> None:
        control_runs = processes.running(self.layout, "control", control.API) is not None
        inotify.check(sum(not host.booted for host in hosts), control=not control_runs)

    @property
    def _store(self) -> Store:
        return Store(cache_dir() / "store")

    def _load(self, archives: Mapping[str, Path]) -> None:
        hosts = [self._host(name) for name in self.nodes() if self._host(name).booted]
        with step(f"images {', '.join(archives)}"), ThreadPoolExecutor(max(1, len(hosts))) as pool:
            list(pool.map(lambda host: load(host, archives), hosts))

    def _stock(self, more: Mapping[str, Path]) -> dict[str, Path]:
        """The images of the bed, and those that its nodes have got besides, in their contents if they are kept."""
        known = recipes()
        archives = {**built(*(name for name in known if not name.startswith(install.IMAGE))), **more}
        for node in self.nodes():
            for name, file in marks(self._host(node)).archives().items():
                if name in known and name not in archives:
                    kept = cache_dir() / file
                    archives[name] = kept if kept.exists() else built(name)[name]
        with step(f"{len(archives)} images"):
            self._store.update(archives)
        return archives

    def _start_control(self) -> None:
        with step("control plane"):
            control.start_etcd(self.layout)
            control.start_api(self.layout, self.binaries)
            control.wait_ready(self.layout, self.binaries)
            control.start_controllers(self.layout, self.binaries)
            control.start_routes(self.layout)

    def _start_host(self, host: NodeHost, taints: tuple[str, ...], archives: Mapping[str, Path]) -> None:
        with step(host.name):
            prepare(host, self._store)
            host.boot(taints)
            host.start_containerd()
            load(host, archives)

    def _wait_registered(self, hosts: Sequence[NodeHost]) -> None:
        def registered() -> bool:
            for host in hosts:
                host.check()
            names = self.kubectl("get", "nodes", "-o", "jsonpath={.items[*].metadata.name}").split()
            return all(host.name in names for host in hosts)

        def explain() -> str:
            return "".join(processes.tail(self.layout, host.name, "kubelet") for host in hosts)

        processes.wait("nodes in the API", registered, 90, explain, pause=0.3)


def built(*names: str) -> dict[str, Path]:
    """Archives of those images by their names, built if need be. Raises BedError."""
    try:
        return build_images(names)
    except ImageError as error:
        raise BedError(str(error)) from None


def clusters() -> list[str]:
    """Names of all that have left a trace on this machine."""
    found = set(cgroups.names())
    for folder in (STATE, DISKS):
        found |= {p.name for p in folder.iterdir()} if folder.exists() else set()
    for path in NETNS.glob("fimk-*-control") if NETNS.exists() else ():
        found.add(path.name.removeprefix("fimk-").removesuffix("-control"))
    return sorted(found)
