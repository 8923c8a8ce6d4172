"""Building a lab, looking at it, and removing every trace of it."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from fimbria.lab import components, fabric, kernel, state
from fimbria.lab.errors import LabError
from fimbria.lab.layout import NETNS_DIR, PREFIX, STATE_ROOT, LabSpec, Member, Paths, check_name
from fimbria.lab.manifests import Manifest, parse
from fimbria.lab.objects import Objects, apply_all
from fimbria.lab.runner.spec import RUNNER_VERSION
from fimbria.lab.slowness import factor
from fimbria.sources.k8s import config
from fimbria.sources.k8s.errors import ApiError
from fimbria.sources.k8s.resources import CILIUM_NODES, NAMESPACES, NODES
from fimbria.sources.k8s.types.core import Node

API_SERVER, CLOUD = "control/apiserver", f"{components.MACHINE}/cloud"
API_PATIENCE, NODE_PATIENCE = 20.0 * factor(), 60.0 * factor()  # seconds

Progress = Callable[[str], None]


def quiet(_: str) -> None:
    return


def need_root() -> None:
    """Raises LabError."""
    if os.geteuid() != 0:
        raise LabError("the lab needs root: it creates namespaces, mounts and cgroups")


def up(spec: LabSpec, progress: Progress = quiet) -> None:
    """Builds and starts a lab. On failure or interruption what was built is removed again. Raises LabError."""
    need_root()
    spec.check()
    kernel.binary("labrun")
    root = kernel.cgroup_root()
    with state.locked(spec.name):
        if remains(spec.name):
            raise LabError(f"lab {spec.name} already exists, or a part of it: fimbria lab down --name {spec.name}")
        try:
            _build(spec, root / Paths(spec.name).cgroup_name, progress)
        except BaseException:
            progress("failed: removing what was built")
            _remove(spec.name)
            raise


def _build(spec: LabSpec, group: Path, progress: Progress) -> None:
    paths = Paths(spec.name)
    progress("state and cgroups")
    state.create(spec)
    for member in ("control", "fabric", "world", components.MACHINE):
        (group / member / "system").mkdir(parents=True)
    for node in spec.node_names:
        _node_cgroups(group / node)
    progress(f"fabric: {spec.nodes} nodes, control plane and outside world around a router")
    fabric.create(spec, paths)
    progress("nodes: " + ", ".join(spec.node_names))
    with ThreadPoolExecutor(4) as pool:
        booting = [pool.submit(boot, paths, node) for node in spec.node_names]
        _start_api(spec, paths, progress)
        for future in booting:
            future.result()
    _start_rest(spec, paths, progress)


def _start_api(spec: LabSpec, paths: Paths, progress: Progress) -> None:
    """The API server, the way to it, and the custom resources that everything else relies on."""
    table = components.table(spec, paths)
    if API_SERVER in table:
        progress("API server (embedded)")
        components.start(paths, API_SERVER, table[API_SERVER].argv())
        components.wait_for("the API server's kubeconfig", paths, API_SERVER, paths.kubeconfig.exists, API_PATIENCE)
    elif not spec.kubeconfig:
        raise LabError("this installation has no embedded API server: give --kubeconfig")
    components.start(paths, CLOUD, table[CLOUD].argv())
    components.wait_for("the way to the API server", paths, CLOUD, paths.host_kubeconfig.exists, API_PATIENCE)
    progress("custom resources")
    asyncio.run(_prepare_api(spec, paths))


async def _wait_api(client: Objects) -> None:
    """Raises LabError if the server doesn't answer in time."""
    deadline = time.monotonic() + API_PATIENCE
    while True:
        try:
            await client.list(NAMESPACES)
            return
        except ApiError as e:
            if time.monotonic() > deadline:
                raise LabError(f"the API server doesn't answer: {e}") from None
        await asyncio.sleep(0.05)


async def _prepare_api(spec: LabSpec, paths: Paths) -> None:
    async with api(paths) as client:
        await _wait_api(client)
        await _remove_old_nodes(spec, client)
        failures: list[str] = []
        await apply_all(
            client, definitions(), lambda m, said: failures.append(said) if said.startswith("error") else None
        )
        if failures:
            raise LabError(failures[0])


async def _remove_old_nodes(spec: LabSpec, client: Objects) -> None:
    """A server that served a lab before still has its nodes, Ready as they were, and what belongs to them.

    Raises LabError if a node of ours has the name of one that is no lab's.
    """
    for node in (await client.request("GET", "/api/v1/nodes"))["items"]:
        name = node["metadata"]["name"]
        if name not in spec.node_names:
            continue
        if (node["status"].get("nodeInfo") or {}).get("kubeletVersion") != RUNNER_VERSION:
            raise LabError(f"the API server has a node {name} that is no lab's: this lab can't use the name")
        await client.delete(NODES, name, missing_ok=True)
        await client.delete(CILIUM_NODES, name, missing_ok=True)


def definitions() -> list[Manifest]:
    """The custom resource definitions that ship with the package."""
    files = sorted(
        (f for f in resources.files("fimbria.crds").iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name
    )
    return [m for f in files for m in parse(f.read_text(), f.name)]


def _start_rest(spec: LabSpec, paths: Paths, progress: Progress) -> None:
    running = state.processes(paths)
    rest = {name: c for name, c in components.table(spec, paths).items() if name not in running}
    kinds = list(dict.fromkeys(name.split("/")[1] for name in rest))
    progress("processes: " + ", ".join(kinds))
    for name, component in rest.items():
        components.start(paths, name, component.argv())
    ready = any(name.endswith("/agent") for name in rest)
    progress("waiting until the nodes are " + ("ready" if ready else "registered"))
    asyncio.run(_wait_nodes(spec, paths, ready))


async def _wait_nodes(spec: LabSpec, paths: Paths, ready: bool) -> None:
    """Raises LabError naming what is missing and the last words of who is to blame."""
    deadline = time.monotonic() + NODE_PATIENCE
    async with api(paths) as client:
        while True:
            known = {n.metadata.name: n for n in (await client.list(NODES)).items}
            missing = [n for n in spec.node_names if n not in known or (ready and not is_ready(known[n]))]
            if not missing:
                return
            for name, process in state.processes(paths).items():
                if not process.alive():
                    raise LabError(f"{name} ended: {components.tail(components.log_path(paths, name))}")
            if time.monotonic() > deadline:
                culprit = f"{missing[0]}/{'agent' if ready and missing[0] in known else 'runner'}"
                words = components.tail(components.log_path(paths, culprit))
                why = ready_message(known.get(missing[0]))
                late = f"{', '.join(missing)}: not ready after {NODE_PATIENCE:.0f} s: {why}"
                raise LabError(f"{late}; last words of {culprit}: {words}")
            await asyncio.sleep(0.1)


def is_ready(node: Node) -> bool:
    return any(c.type == "Ready" and c.status == "True" for c in node.status.conditions or ())


def ready_message(node: Node | None) -> str:
    """What the node says of its readiness."""
    conditions = node.status.conditions or () if node else ()
    return next((c.message for c in conditions if c.type == "Ready"), "not registered")


def api(paths: Paths) -> Objects:
    """A client for use on the machine itself. Raises LabError."""
    try:
        return Objects(config.load(paths.host_kubeconfig), component="lab", rate=500, burst=1000)
    except config.ConfigError as e:
        raise LabError(str(e)) from None


def boot(paths: Paths, node: str) -> None:
    """Starts a node's pid 1. Raises LabError."""
    argv = [sys.executable, "-m", "fimbria.lab.boot", paths.lab, node, str(components.cgroup(paths, node))]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, cwd="/")
    if done.returncode != 0:
        raise LabError(f"{node} didn't start: {done.stderr.strip().splitlines()[-1:]}")
    state.remember(paths, f"{node}/{state.INIT}", kernel.process(int(done.stdout)))


# --- removal ---------------------------------------------------------------------------------------------------


def remains(lab: str) -> list[str]:
    """Every trace of a lab, found by name and not by what the state directory says."""
    paths = Paths(lab)
    found = [f"namespace {p.name}" for p in _namespaces(lab)]
    with contextlib.suppress(LabError):
        group = kernel.cgroup_root() / paths.cgroup_name
        found += [f"cgroup {group}"] if group.exists() else []
    found += [f"mount {p}" for p in _mounts(lab)]
    found += [f"directory {paths.state}"] if paths.state.exists() else []
    return found


def _namespaces(lab: str) -> list[Path]:
    return sorted(NETNS_DIR.glob(f"{PREFIX}{lab}.*")) if NETNS_DIR.is_dir() else []


def _mounts(lab: str) -> list[Path]:
    state_dir = Paths(lab).state
    return [p for p in kernel.mount_points(STATE_ROOT) if p == state_dir or state_dir in p.parents]


def down(lab: str, progress: Progress = quiet) -> bool:
    """Removes every trace of a lab, however far it got. False if there was none. Raises LabError for what resists."""
    need_root()
    check_name(lab)
    with state.locked(lab):
        if not remains(lab):
            return False
        progress("removing processes, namespaces, mounts and cgroups")
        _remove(lab)
    return True


def _remove(lab: str) -> None:
    """Once more if something is left: of an `up` that was killed, the last helpers may just be finishing their work."""
    for _ in range(5):
        failures = _remove_once(lab)
        if not remains(lab):
            return
        time.sleep(0.05)
    left = failures or remains(lab)
    raise LabError(f"lab {lab} could not be removed completely: {'; '.join(left)}")


def _remove_once(lab: str) -> list[str]:
    """The processes first: they hold the rest. Every step is tried; returns what went wrong."""
    paths = Paths(lab)
    failures: list[str] = []

    def attempt(step: Callable[[], object]) -> None:
        try:
            step()
        except (LabError, OSError) as e:
            failures.append(str(e))

    attempt(lambda: kernel.cgroup_kill(kernel.cgroup_root() / paths.cgroup_name))
    for namespace in _namespaces(lab):
        attempt(partial(kernel.ip, "netns", "delete", namespace.name))
    for point in _mounts(lab):
        attempt(partial(kernel.umount, point))
    attempt(lambda: _remove_directory(paths))
    return failures


def _remove_directory(paths: Paths) -> None:
    import shutil

    if paths.state.exists():
        shutil.rmtree(paths.state)


# --- status ----------------------------------------------------------------------------------------------------


def status(lab: str) -> dict[str, Any]:
    """A picture of the lab as plain values; `healthy` if everything that was started runs. Raises LabError if there
    is no such lab."""
    spec, paths = state.load(lab), Paths(lab)
    nodes: dict[str, Node] = {}
    error = ""
    try:
        nodes = asyncio.run(_nodes(paths))
    except (ApiError, LabError) as e:
        error = str(e)
    processes = [{"name": n, "pid": p.pid, "running": p.alive()} for n, p in state.processes(paths).items()]
    shown = [_node_picture(spec.node(n), nodes.get(n)) for n in spec.node_names]
    healthy = not error and all(p["running"] for p in processes) and all(n["ready"] or not spec.agents for n in shown)
    return {
        "name": lab,
        "routing": spec.routing,
        "pools": [p for p in (spec.ipv4_pool, spec.ipv6_pool) if p],
        "nodes": shown,
        "processes": processes,
        "api_error": error,
        "healthy": healthy,
        "kubeconfig": str(paths.host_kubeconfig),
    }


async def _nodes(paths: Paths) -> dict[str, Node]:
    async with api(paths) as client:
        return {n.metadata.name: n for n in (await client.list(NODES)).items}


def _node_picture(member: Member, node: Node | None) -> dict[str, Any]:
    return {
        "name": member.name,
        "addresses": [member.ipv4, member.ipv6],
        "ready": node is not None and is_ready(node),
        "message": ready_message(node),
    }


def start(lab: str, name: str) -> None:
    """Starts a process of the lab that isn't running; for NODE/init, the whole node as after a power cut. Raises
    LabError."""
    spec, paths = state.load(lab), Paths(lab)
    known = components.table(spec, paths)
    node, _, component = name.partition("/")
    if component == state.INIT and node in spec.node_names:
        _boot_again(spec, paths, node)
        return
    if name not in known:
        raise LabError(f"lab {lab} has no process {name}; it has {', '.join(known)}")
    components.start(paths, name, known[name].argv())
    if name in (API_SERVER, CLOUD):
        asyncio.run(_api_back(paths))


async def _api_back(paths: Paths) -> None:
    async with api(paths) as client:
        await _wait_api(client)


def _boot_again(spec: LabSpec, paths: Paths, node: str) -> None:
    """Files on the node's disk are still there; processes, links, maps and /run are gone."""
    init = state.recall(paths, f"{node}/{state.INIT}")
    if init and init.alive():
        raise LabError(f"{node} is running: fimbria lab kill --name {paths.lab} {node}/{state.INIT}")
    group = components.cgroup(paths, node)
    kernel.cgroup_kill(group)
    _node_cgroups(group)
    fabric.replace_member(spec, paths, spec.node(node))
    boot(paths, node)
    for name, component in components.table(spec, paths).items():
        if name.startswith(f"{node}/"):
            components.start(paths, name, component.argv())
    components.send(paths, CLOUD, signal.SIGHUP)


def _node_cgroups(group: Path) -> None:
    for name in ("system", "pods"):
        (group / name).mkdir(parents=True)
