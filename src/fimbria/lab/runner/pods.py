"""One pod on this node, from its sandbox to its removal.

Rules
1. The sandbox comes first: namespace, CNI ADD, sandbox.json. What is on disk is never made again, so a new runner
   adopts it.
2. Init containers run one after the other, each to success (a sidecar only has to start); then all others at once.
3. A container that ends is started again as restartPolicy says, after a pause that doubles up to a limit.
4. The end: SIGTERM to all, SIGKILL after the grace period, CNI DEL until it succeeds, and only then is the directory
   forgotten.
5. A runner that ends kills nothing.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from fimbria.lab import kernel
from fimbria.lab.errors import LabError
from fimbria.lab.runner import cni, containers, probes
from fimbria.lab.runner.cni import Attachment, CniError, Runtime
from fimbria.lab.runner.containers import Running, Sandbox, Start, Store
from fimbria.lab.runner.spec import (
    Addresses,
    ContainerSpec,
    ContainerState,
    PodPlan,
    command,
    environment,
    phase,
    status,
)

RESTART_FIRST, RESTART_MOST, STABLE = 1.0, 30.0, 60.0  # seconds
SANDBOX_FIRST, SANDBOX_MOST = 0.1, 5.0
log = logging.getLogger("runner.pod")

Config = Callable[[], cni.NetworkList]  # raises CniError


@dataclass(frozen=True)
class Host:
    """What pods need to know of their node."""

    store: Store
    runtime: Runtime
    config: Config
    addresses: tuple[str, ...]


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def attachment(sandbox: Sandbox) -> Attachment:
    args = (
        ("IgnoreUnknown", "1"),
        ("K8S_POD_NAMESPACE", sandbox.namespace),
        ("K8S_POD_NAME", sandbox.name),
        ("K8S_POD_INFRA_CONTAINER_ID", sandbox.uid),
        ("K8S_POD_UID", sandbox.uid),
    )
    return Attachment(sandbox.uid, sandbox.netns, "eth0", args, sandbox.capabilities or {})


class PodWorker:
    """Runs one pod; `changed` is called whenever its status may have."""

    def __init__(self, plan: PodPlan, host: Host, changed: Callable[[], None]) -> None:
        self.plan = plan
        self._host = host
        self._changed = changed
        self._sandbox: Sandbox | None = None
        self._states = {c.name: ContainerState() for c in plan.containers}
        self._running: dict[str, Running] = {}
        self._started = now()

    @property
    def addresses(self) -> Addresses:
        return Addresses(self._sandbox.addresses if self._sandbox else (), self._host.addresses)

    @property
    def finished(self) -> bool:
        return phase(self.plan, self._states) in ("Succeeded", "Failed")

    def status(self, before: list[Mapping[str, Any]]) -> dict[str, Any]:
        return status(self.plan, self._states, self.addresses, started=self._started, now=now(), before=before)

    async def run(self, known: Sandbox | None) -> None:
        """Until every container is done for good; `known` is the sandbox that a former runner made."""
        self._sandbox = known or await self._make_sandbox()
        self._write_files()
        self._changed()
        async with asyncio.TaskGroup() as group:
            for container in self.plan.containers:
                if container.init and not container.sidecar:
                    await self._supervise(container)
                else:
                    group.create_task(self._supervise(container))

    # --- sandbox ---------------------------------------------------------------------------------------------------

    async def _make_sandbox(self) -> Sandbox:
        p = self.plan
        sandbox = Sandbox(p.uid, p.namespace, p.name, "", self._host.addresses, p.capabilities)
        if p.host_network:
            self._host.store.save(sandbox)
            return sandbox
        pause = SANDBOX_FIRST
        while True:
            try:
                return await self._attach(sandbox)
            except (CniError, LabError, OSError) as e:
                log.warning("%s/%s: sandbox: %s", p.namespace, p.name, e)
                self._all_waiting("ContainerCreating", str(e))
            await asyncio.sleep(pause)
            pause = min(pause * 2, SANDBOX_MOST)

    async def _attach(self, sandbox: Sandbox) -> Sandbox:
        """Namespace and CNI ADD. What fails half-way is undone, so that the next attempt starts afresh."""
        config = self._host.config()
        netns = await asyncio.to_thread(containers.create_netns, f"cni-{sandbox.uid}")
        sandbox = replace(sandbox, netns=netns, addresses=())
        self._host.store.save(sandbox)  # before ADD: a runner that dies now must know what to DEL
        try:
            result = await self._host.runtime.add(config, attachment(sandbox))
            sandbox = replace(sandbox, addresses=tuple(cni.result_addresses(result)))
            self._host.store.save(sandbox)
            return sandbox
        except BaseException:
            await asyncio.shield(self._detach(sandbox))
            raise

    async def _detach(self, sandbox: Sandbox) -> None:
        try:
            await self._host.runtime.delete(self._config_or_none(), attachment(sandbox))
        except CniError as e:
            log.warning("%s/%s: %s", sandbox.namespace, sandbox.name, e)
        await asyncio.to_thread(containers.delete_netns, sandbox.netns)
        await asyncio.to_thread(self._host.store.remove, sandbox.uid)

    def _config_or_none(self) -> cni.NetworkList | None:
        try:
            return self._host.config()
        except CniError:
            return None

    def _all_waiting(self, reason: str, message: str) -> None:
        self._states = {n: replace(s, state="waiting", reason=reason, message=message) for n, s in self._states.items()}
        self._changed()

    def _write_files(self) -> None:
        directory, p = self._host.store.pod(self.plan.uid), self.plan
        lines = ["127.0.0.1\tlocalhost", "::1\tlocalhost ip6-localhost ip6-loopback"]
        lines += [f"{a}\t{p.hostname}" for a in self.addresses.pod]
        lines += [f"{ip}\t{' '.join(names)}" for ip, names in p.host_aliases]
        (directory / "hosts").write_text("\n".join(lines) + "\n")
        dns = [f"nameserver {a}" for a in p.dns] + ([f"search {' '.join(p.searches)}"] if p.searches else [])
        (directory / "resolv.conf").write_text("\n".join(dns) + "\n")

    # --- containers ------------------------------------------------------------------------------------------------

    async def _supervise(self, container: ContainerSpec) -> None:
        """Runs a container until it need not run any more."""
        name, store, uid = container.name, self._host.store, self.plan.uid
        attempt = store.last_attempt(uid, name)
        running = containers.find(store.container(uid, name, attempt)) if attempt >= 0 else None
        pause = RESTART_FIRST
        while True:
            begin = asyncio.get_running_loop().time()
            if running is None:
                attempt += 1
                running = await self._launch(container, attempt)
            code = await self._watch(container, running, attempt) if running else containers.LOST
            running = None
            if not self._again(container, code):
                return
            if asyncio.get_running_loop().time() - begin > STABLE:
                pause = RESTART_FIRST
            self._set(
                container,
                state="waiting",
                reason="CrashLoopBackOff",
                message=f"ended with {code}, next start in {pause:.0f} s",
                restarts=attempt + 1,
            )
            await asyncio.sleep(pause)
            pause = min(pause * 2, RESTART_MOST)

    def _again(self, container: ContainerSpec, code: int) -> bool:
        if container.init and not container.sidecar:
            return code != 0 and self.plan.restart_policy != "Never"
        policy = "Always" if container.sidecar else self.plan.restart_policy
        return policy == "Always" or (policy == "OnFailure" and code != 0)

    async def _launch(self, container: ContainerSpec, attempt: int) -> Running | None:
        assert self._sandbox is not None
        store, sandbox = self._host.store, self._sandbox
        directory = store.pod(sandbox.uid)
        try:
            env = environment(self.plan, container, self.addresses)
            binds = (
                []
                if self.plan.host_network
                else [f"{directory}/hosts:/etc/hosts", f"{directory}/resolv.conf:/etc/resolv.conf"]
            )
            start = Start(
                container.name, attempt, command(container, env), env, container.cwd, self.plan.hostname, binds
            )
            return await containers.launch(store, sandbox, start)
        except (LabError, OSError) as e:
            log.warning("%s/%s: %s", self.plan.namespace, self.plan.name, e)
            self._set(container, state="waiting", reason="CreateContainerError", message=str(e))
            return None

    async def _watch(self, container: ContainerSpec, running: Running, attempt: int) -> int:
        """From start to end of one attempt. Returns its exit code."""
        started = now()
        self._running[container.name] = running
        self._set(
            container,
            state="running",
            started=started,
            restarts=attempt,
            ready=container.readiness is None,
            message="",
            reason="",
        )
        prober = asyncio.create_task(self._probe(container, running)) if container.readiness else None
        try:
            code = await containers.wait(running)
        finally:
            if prober:
                prober.cancel()
        del self._running[container.name]
        finished = now()
        done_init = container.init and code == 0
        assert self._sandbox is not None
        words = container.last_words and code != 0
        self._set(
            container,
            state="terminated",
            message=containers.last_words(self._host.store, self._sandbox, container.name) if words else "",
            exit_code=code,
            finished=finished,
            ready=done_init,
            last_exit=(code, started, finished),
        )
        return code

    async def _probe(self, container: ContainerSpec, running: Running) -> None:
        probe = container.readiness
        assert probe is not None
        judge = probes.Judge(probe)
        address = next(iter(self.addresses.pod), "127.0.0.1")
        await asyncio.sleep(probe.initial_delay)
        while True:
            if judge.feed(await probes.succeeds(probe, address, running)):
                self._set(container, ready=judge.ready)
            # until it is ready for the first time, waiting a whole period would only slow everything down
            await asyncio.sleep(probe.period if judge.ready else min(probe.period, 0.5))

    def _set(self, container: ContainerSpec, **changes: Any) -> None:
        self._states[container.name] = replace(self._states[container.name], **changes)
        self._changed()

    # --- end -------------------------------------------------------------------------------------------------------

    async def terminate(self, grace: float) -> None:
        """Rule 4. Call after the task of `run` has ended. Returns when nothing of the pod is left on the node."""
        sandbox = self._sandbox or next((s for s in self._host.store.sandboxes() if s.uid == self.plan.uid), None)
        if sandbox is not None:
            await end_sandbox(self._host, sandbox, grace)


async def end_sandbox(host: Host, sandbox: Sandbox, grace: float) -> None:
    """Stops and removes what the disk says of a pod, whoever started it."""
    found = [containers.find(d) for d in sorted(host.store.pod(sandbox.uid).glob("containers/*/*"))]
    await asyncio.gather(*(containers.stop(r, grace) for r in found if r))
    await asyncio.to_thread(kernel.cgroup_kill, host.store.cgroup / sandbox.uid)
    if sandbox.netns:
        await _delete_until_done(host, sandbox)
        await asyncio.to_thread(containers.delete_netns, sandbox.netns)
    await asyncio.to_thread(host.store.remove, sandbox.uid)


async def _delete_until_done(host: Host, sandbox: Sandbox) -> None:
    pause = SANDBOX_FIRST
    while True:
        try:
            config: cni.NetworkList | None = host.config()
        except CniError:
            config = None
        try:
            return await host.runtime.delete(config, attachment(sandbox))
        except CniError as e:
            log.warning("%s/%s: %s", sandbox.namespace, sandbox.name, e)
        await asyncio.sleep(pause)
        pause = min(pause * 2, SANDBOX_MOST)
