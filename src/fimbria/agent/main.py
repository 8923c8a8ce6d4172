"""The agent's composition root: builds everything in order, then runs it in one task group.

Start, restart, upgrade and recovery are this one path: restore what was decided, open or load the datapath, follow the
sources, and once all of them have been seen, bring the kernel to the desired state. Until then it goes on with what it
has. If any part dies the process ends, and is started again.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from fimbria.agent import datapath as dp
from fimbria.agent import devices, recovery, requires
from fimbria.agent.api import AgentApi
from fimbria.agent.config import AgentConfig, ConfigError, parse, port_range
from fimbria.agent.endpoints import EndpointManager
from fimbria.agent.engine import DesiredRows, Engine, NumberBook
from fimbria.agent.epoch import Epoch
from fimbria.agent.healthcheck import Freshness, HealthChecks
from fimbria.agent.identities import Identities
from fimbria.agent.install import install_config, install_plugin, keep_config
from fimbria.agent.journal import Journal
from fimbria.agent.keeper import Keeper
from fimbria.agent.learned import Learned
from fimbria.agent.next_hops import NextHops
from fimbria.agent.node import NodeRegistration
from fimbria.agent.probes import Probes
from fimbria.agent.publisher import Publisher
from fimbria.agent.sockets import SocketCutter
from fimbria.agent.sources import Sources, vocabulary
from fimbria.agent.wiring import Wiring
from fimbria.apply.attach import SOCKET_HOOKS, CgroupTarget, ClsactTarget, TcxTarget
from fimbria.apply.devices import NodeDevices
from fimbria.apply.loop import ApplyLoop, Stage
from fimbria.apply.network import NeighbourTarget, NextHopTarget, RouteTarget, SysctlTarget
from fimbria.apply.programs import Constant, Datapath
from fimbria.apply.xdp import XdpTarget
from fimbria.compute.service_frontends import TCP, Defaults
from fimbria.compute.service_rows import MAPS
from fimbria.decide.ipam import AddressPool
from fimbria.kernel import probe
from fimbria.kernel.grace import GracePeriod
from fimbria.kernel.netlink import NetlinkSocket
from fimbria.kernel.sweep import offsets
from fimbria.learned import sizing
from fimbria.model.address import Prefix, pack
from fimbria.model.network import DeviceSet
from fimbria.model.node import Node
from fimbria.model.rows import FrontendKey, Runtime
from fimbria.model.service import ServiceKey
from fimbria.sources.cni.server import CniServer
from fimbria.sources.cni.spec import CniError, Code, Request
from fimbria.sources.k8s import config as k8s_config
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.events import EventRecorder
from fimbria.startup import postpone_collection
from fimbria.tables import Tables

log = logging.getLogger("fimbria.agent")
VERDICT_TARGETS: Final = frozenset(("policy_sets", "identities", "cidrs", "ipcache", "endpoints"))
ICMP_PAUSE_MS: Final = "20"  # whole ticks at every HZ that kernels have: what is written is read back
CNI_PATIENCE: Final = 20.0  # seconds for a request that comes while the agent starts
CNI_PAUSE: Final = 0.05
PROMOTE_PAUSE: Final = 0.5
PROMOTE_WITHIN: Final = 30.0
SAVE_PAUSE: Final = 1.0
START_PATIENCE: Final = 60.0
ENDPOINT_ID_BLOCK: Final = 1000


@dataclass(slots=True)
class Agent:
    """Everything an agent consists of, for the API to show."""

    config: AgentConfig
    tables: Tables
    rows: DesiredRows
    numbers: NumberBook
    journal: Journal
    client: ApiClient
    netlink: NetlinkSocket
    layouts: dp.Layouts
    datapath: Datapath
    engine: Engine
    loop: ApplyLoop
    sources: Sources
    identities: Identities
    pool: AddressPool
    wiring: Wiring
    registration: NodeRegistration
    attach: str
    maker: NodeDevices | None = None
    devices: DeviceSet | None = None
    constants: Mapping[str, Constant] = field(default_factory=dict)
    endpoints: EndpointManager | None = None
    cni: CniServer | None = None
    health: HealthChecks | None = None
    started: float = field(default_factory=time.time)
    ready_after: float = 0.0
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    epoch: Epoch = field(init=False)
    keeper: Keeper = field(init=False)
    learned: Learned = field(init=False)
    sockets: SocketCutter = field(init=False)
    _next_id: int = 1
    _reserved_ids: int = 0
    _saved_numbers: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.keeper = Keeper(self)
        self.learned = Learned(self)
        self.sockets = SocketCutter(self)
        self.engine.on_services = self.sockets.wake.set
        self.epoch = Epoch(self._write_epoch, GracePeriod().wait)

    def sweep(self) -> None:
        """Remove what former versions left, once nothing uses it."""
        failures = self.loop.failures()
        if not any(failures.get(links) for links in ("device_links", "xdp_links", "socket_links")):
            self.datapath.sweep()

    def next_endpoint_id(self) -> int:
        """A number no endpoint of this boot ever had. Reserved in blocks, so that it needn't be written each time."""
        number = self._next_id
        self._next_id += 1
        if number >= self._reserved_ids:
            self._reserved_ids = number + ENDPOINT_ID_BLOCK
            self.save_numbers()
        return number

    def skip_endpoint_ids(self, highest: int) -> None:
        """Numbers up to this one are in use, whatever the journal says."""
        if highest >= self._next_id:
            self._next_id = self._reserved_ids = highest + 1

    def restore_numbers(self) -> None:
        """From the journal, before anything is allocated."""
        saved = self.journal.numbers()
        self.numbers.restore(saved)
        self._next_id = self._reserved_ids = max(int(saved.get("endpoint_ids", 1)), 1)

    def save_numbers(self) -> None:
        """To the journal, if anything changed."""
        state = {**self.numbers.save(), "endpoint_ids": self._reserved_ids}
        if state != self._saved_numbers:
            self.journal.save_numbers(state)
            self._saved_numbers = state

    def bump_epoch(self, changed: frozenset[str]) -> None:
        """After rows that could turn a verdict: every connection is judged again at its next packet."""
        if changed & VERDICT_TARGETS:
            self.epoch.bump()

    def _write_epoch(self, epoch: int) -> None:
        self.datapath.maps["runtime"].update(bytes(4), self.layouts["runtime"].encode(Runtime(epoch)))


class StartError(Exception):
    """The agent can't run here; the text is for people."""


def choose_attach(wanted: str) -> str:
    """`tcx` or `clsact`. Raises StartError if tcx is demanded and missing."""
    available = probe.has_tcx()
    if wanted == "tcx" and not available:
        raise StartError("--attach tcx: this kernel has no tcx links (Linux 6.6 or later)")
    return wanted if wanted != "auto" else ("tcx" if available else "clsact")


def build(config: AgentConfig, client: ApiClient) -> Agent:
    """Construct all parts without any I/O to the cluster. Raises StartError, OSError."""
    tables, rows, numbers = Tables(), DesiredRows(), NumberBook()
    journal = Journal(config.run / "state")
    journal.open()
    layouts = dp.Layouts()
    netlink = NetlinkSocket()
    datapath = Datapath(
        Path(config.bpffs), dp.objects_folder(), _sizes(config), layouts.of_map, dp.arrays(config),
        names=dp.objects(config), expires={"conntrack": offsets(layouts.btf, "ct_entry")["expires"]},
    )  # fmt: skip
    words = vocabulary(config.label_filter, config.cluster_name)
    engine = Engine(
        tables, rows, numbers, node=config.node_name, cluster=config.cluster_name, overlay=config.overlay,
        services=Defaults(config.forwarding, config.load_balancing), xdp=config.xdp,
    )  # fmt: skip
    engine.api_servers = api_server_ends(client.config.server)
    identities = Identities(client, tables, words.labels, allocate=config.identity_allocation == "agent")
    engine.on_labels = identities.labels_changed
    wiring = Wiring(netlink, 1500, sysctls=Path(config.procfs) / "sys")
    agent = Agent(
        config=config, tables=tables, rows=rows, numbers=numbers, journal=journal, client=client, netlink=netlink,
        layouts=layouts, datapath=datapath, engine=engine,
        loop=ApplyLoop([], audit_interval=config.audit_interval),
        sources=Sources(client, tables, config.node_name, words, config.endpoint_slices), identities=identities,
        pool=AddressPool(), wiring=wiring,
        registration=NodeRegistration(client, tables, journal, config.node_name, _boot_id(), wiring.host_has),
        attach=choose_attach(config.attach),
    )  # fmt: skip
    agent.loop.on_applied = agent.bump_epoch
    agent.restore_numbers()
    return agent


def _sizes(config: AgentConfig) -> dict[str, int]:
    found = dp.sizes(config, dp.machine_memory(), dp.existing_entries(Path(config.bpffs)))
    shown = ", ".join(f"{name} {found[name]}" for name in sizing.TABLES)
    log.info("tables of connections: %s", shown)
    return found


async def prepare(agent: Agent) -> None:
    """Everything between knowing the node's addresses and following the sources: devices, programs, targets."""
    node = await _node_with_blocks(agent)
    devices.prepare(agent, node)
    agent.epoch.restore(_read_epoch(agent))
    agent.loop.stages.extend(stages(agent))
    agent.loop.bind()
    _wanted_sysctls(agent)
    for hook in SOCKET_HOOKS if agent.config.socket_services != "off" else ():
        agent.rows.socket_links.put(hook, f"sock_{hook}")
    assert agent.devices is not None
    agent.engine.set_devices(agent.devices)
    _restore_services(agent)
    agent.pool.resting = agent.engine.is_spoken_for
    agent.endpoints = EndpointManager(
        agent.tables, agent.engine, agent.loop, agent.journal, agent.pool, agent.wiring, agent.identities.identify,
        agent.sources.fetch_pod, agent.next_endpoint_id,
        {(17, agent.config.overlay_port): "packets between nodes (--overlay-port)"} if agent.config.overlay else {},
    )  # fmt: skip
    agent.identities.on_changed = agent.endpoints.set_identity
    restored = agent.endpoints.restore()
    log.info("datapath ready: %s, %s, %d endpoints restored", agent.config.routing, agent.attach, restored)


def stages(agent: Agent) -> list[Stage]:
    """The targets, references first."""
    rows, datapath, layouts = agent.rows, agent.datapath, agent.layouts

    def known_devices() -> list[int]:
        extra = [agent.devices.overlay, *agent.devices.uplinks] if agent.devices else []
        return [*(e.ifindex for e in agent.tables.endpoints.values()), *filter(None, extra)]

    def our_devices() -> list[int]:
        extra = [agent.devices.overlay] if agent.devices and agent.devices.overlay else []
        return [*(e.ifindex for e in agent.tables.endpoints.values()), *extra]

    def plain(name: str) -> Stage:
        return Stage(dp.map_target(name, datapath.maps[name], layouts), getattr(rows, name))

    frontends = plain("frontends")
    frontends.requires = requires.of_frontend(rows)
    identities = plain("identities")
    identities.vouches = True
    identities.requires = requires.of_identity(agent.engine)
    filters = ClsactTarget(datapath, agent.netlink, known_devices)
    links = TcxTarget(datapath, filters) if agent.attach == "tcx" else filters
    cgroup = agent.config.cgroup or probe.cgroup2_mount()
    sysctls = Path(agent.config.procfs) / "sys"
    found = [
        Stage(SysctlTarget(lambda: list(rows.sysctls.desired), sysctls), rows.sysctls, quick=True),
        plain("backends"), plain("service_members"), plain("source_ranges"), plain("service_exempt"),
        Stage(dp.tables_target(datapath, agent.config, rows.backends.desired.get), rows.service_tables, thread_from=4),
        plain("service_slots"), frontends,
        Stage(dp.policy_target(datapath, layouts), rows.policy_sets), identities,
        plain("cidrs"), plain("ipcache"),
        Stage(links, rows.device_links, quick=True, swaps=True),
        Stage(XdpTarget(datapath), rows.xdp_links, quick=True, swaps=True),
    ]  # fmt: skip
    if cgroup:
        found.append(Stage(CgroupTarget(datapath, Path(cgroup)), rows.socket_links, quick=True, swaps=True))
    endpoints = plain("endpoints")
    endpoints.requires = requires.of_endpoint(rows)
    found += [
        Stage(NeighbourTarget(agent.netlink, our_devices), rows.neighbours, quick=True),
        endpoints, plain("local_addrs"),
        Stage(RouteTarget(agent.netlink), rows.routes, quick=True),
        Stage(NextHopTarget(agent.netlink, lambda: list(rows.next_hops.desired)), rows.next_hops, quick=True),
    ]  # fmt: skip
    return found


def _read_epoch(agent: Agent) -> int:
    """The epoch in the kernel; 0 in a new map."""
    raw = agent.datapath.maps["runtime"].lookup(bytes(4))
    row: Runtime | None = agent.layouts["runtime"].decode(raw) if raw else None
    return row.policy_epoch if row else 0


def _restore_services(agent: Agent) -> None:
    """Numbers of services and backends, from today's maps or those of a former version: connections name them."""
    datapath = agent.datapath
    names = ("frontends", "service_slots", "backends")
    read: dict[str, dict[Any, Any]] = {n: {} for n in names}
    for version in (datapath.maps, {n: found[0] for n, found in datapath.former.items()}):
        if not read["frontends"] and all(n in version for n in names):
            read = {n: dp.map_target(n, version[n], agent.layouts).read() for n in names}
    spent = _spent_backends(agent)
    agent.engine.services.restore(read["frontends"], read["service_slots"], read["backends"], spent)


def _spent_backends(agent: Agent) -> set[int]:
    """Backends that connections may still name, here or in a former version's table that is carried over."""
    tables = [agent.datapath.maps["conntrack"], *agent.datapath.former.get("conntrack", ())]
    return {backend for table in tables for backend in dp.backends_in_use(table, agent.layouts)}


def api_server_ends(server: str) -> frozenset[FrontendKey]:
    """Address and port of an API server's URL, if it is an address. (One found by name isn't guarded by this.)"""
    url = urlsplit(server)
    try:
        return frozenset({FrontendKey(pack(url.hostname or ""), url.port or 443, TCP)})
    except ValueError:
        return frozenset()


def reserved_ports(config: AgentConfig) -> str:
    """Local ports that the kernel shall give to no socket by itself, as it writes them back: what bindings use, with
    masquerading or for clients of Services, and node ports, whose packets never reach a socket."""
    found: list[list[int]] = []
    for first, last in sorted(
        (port_range("--masquerade-ports", config.masquerade_ports), port_range("--node-ports", config.node_ports))
    ):
        if found and first <= found[-1][1] + 1:
            found[-1][1] = max(last, found[-1][1])
        else:
            found.append([first, last])
    return ",".join(f"{first}-{last}" if first < last else str(first) for first, last in found)


def _wanted_sysctls(agent: Agent) -> None:
    wanted = {"net/ipv4/ip_forward": "1", "net/ipv6/conf/all/forwarding": "1"}
    # An address without a pod answers: the kernel's one answer a second and peer would leave most unanswered.
    wanted |= {"net/ipv4/icmp_ratelimit": ICMP_PAUSE_MS, "net/ipv6/icmp/ratelimit": ICMP_PAUSE_MS}
    wanted["net/ipv4/ip_local_reserved_ports"] = reserved_ports(agent.config)
    agent.rows.sysctls.put_many(wanted)


async def _node_with_blocks(agent: Agent) -> Node:
    """This node once it has pod addresses: from the journal at once, from the operator otherwise."""
    name = agent.config.node_name
    subscription = agent.tables.nodes.subscribe()
    told = False
    while True:
        node = agent.tables.nodes.get(name)
        if node is not None and node.pod_cidrs:
            subscription.close()
            return node
        if not told:
            log.info("waiting for the operator to give node %s pod addresses", name)
            told = True
        await subscription.wait()
        subscription.drain()


async def compute(agent: Agent) -> None:
    """Follow the tables; open the apply loop once every source has been seen."""
    for table in agent.sources.tables_followed():
        await table.wait_synced()
    await recovery.recover(agent)
    agent.engine.step()
    agent.engine.services.settle()
    agent.loop.open()
    await agent.loop.flush()
    agent.epoch.bump()
    agent.ready_after = time.time() - agent.started
    agent.ready.set()
    failures = agent.loop.failures()
    if failures:
        log.error("started with rows that could not be written: %s", {k: len(v) for k, v in failures.items()})
    agent.sweep()
    _install_cni(agent.config)
    nodes, endpoints = len(agent.tables.nodes), len(agent.tables.endpoints)
    log.info("ready after %.2f s: %d nodes, %d endpoints", agent.ready_after, nodes, endpoints)
    while True:
        await agent.engine.changes.wait()
        agent.engine.step()


def _install_cni(config: AgentConfig) -> None:
    if config.cni_bin_dir:
        install_plugin(Path(config.cni_bin_dir))
    if config.cni_conf_dir:
        install_config(Path(config.cni_conf_dir), exclusive=config.cni_exclusive)


async def promote(agent: Agent) -> None:
    """Put tcx links in the place of the filters that new pods start with; in a thread, for each takes milliseconds."""
    target = next((s.target for s in agent.loop.stages if isinstance(s.target, TcxTarget)), None)
    if target is None:
        return
    wake = asyncio.Event()
    target.on_provisional = wake.set
    while True:
        if not target.provisional():
            wake.clear()
            await wake.wait()
        began = time.monotonic()
        for hook in target.provisional():
            # Attaching holds the lock that making interfaces needs: pods that are starting now come first.
            while not _pods_rest(agent) and time.monotonic() - began < PROMOTE_WITHIN:  # noqa: ASYNC110
                await asyncio.sleep(PROMOTE_PAUSE)
            target.promote(hook, await asyncio.to_thread(target.link_for, hook))


def _pods_rest(agent: Agent) -> bool:
    return agent.endpoints is None or time.monotonic() - agent.endpoints.last_request > PROMOTE_PAUSE


async def save(agent: Agent) -> None:
    """Write given-out numbers to the journal, soon after they change; give memory back after audits."""
    audits = 0
    while True:
        await asyncio.sleep(SAVE_PAUSE)
        agent.save_numbers()
        if agent.loop.stats.audits != audits:
            audits = agent.loop.stats.audits
            give_memory_back()


def give_memory_back() -> None:
    """What an audit of a large cluster needed for a moment: the C library would keep it, a tenth of the process."""
    with suppress(AttributeError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


async def run(config: AgentConfig) -> None:
    """Run an agent until it is stopped. Raises StartError and what parts raise."""
    cluster = k8s_config.load(config.kubeconfig or None)
    async with ApiClient(cluster, component="agent") as client:
        agent = build(config, client)
        agent.sources.build()
        api = AgentApi(agent)
        async with asyncio.TaskGroup() as group:
            group.create_task(postpone_collection(agent.ready.wait(), START_PATIENCE), name="collection")
            group.create_task(api.run(), name="api")
            group.create_task(Probes(agent).run(), name="probes")
            agent.cni = CniServer(config.run / "cni.sock", partial(_serve_cni, agent))
            group.create_task(agent.cni.run(), name="cni")
            await agent.registration.addresses()
            group.create_task(agent.sources.run(), name="sources")
            group.create_task(agent.registration.run(), name="registration")
            await prepare(agent)
            events = EventRecorder(client, component="fimbria-agent", host=config.node_name)
            group.create_task(events.run(), name="events")
            addrs, blocks = agent.registration.addrs, partial(_own_blocks, agent)
            publisher = Publisher(client, agent.tables, config.node_name, addrs, blocks, events)
            agent.registration.on_moved = lambda: publisher.moved(agent.registration.addrs)
            group.create_task(agent.loop.run(), name="apply")
            group.create_task(agent.epoch.run(), name="epoch")
            group.create_task(agent.identities.run(), name="identities")
            group.create_task(compute(agent), name="compute")
            group.create_task(_after_ready(agent, publisher.run), name="publisher")
            group.create_task(save(agent), name="save")
            group.create_task(promote(agent), name="promote")
            group.create_task(agent.keeper.run(), name="keeper")
            agent.health = health_checks(agent)
            group.create_task(_after_ready(agent, agent.health.run), name="health checks")
            if config.cni_conf_dir:
                kept = partial(keep_config, Path(config.cni_conf_dir), exclusive=config.cni_exclusive)
                group.create_task(_after_ready(agent, kept), name="cni configuration")
            if config.xdp != "disabled":
                group.create_task(NextHops(agent).run(), name="next hops")
            group.create_task(_collect(agent), name="learned")
            group.create_task(_after_ready(agent, agent.sockets.run), name="sockets")


def health_checks(agent: Agent) -> HealthChecks:
    """What load balancers ask."""
    loop, name = agent.loop, agent.config.node_name
    services = [s for s in loop.stages if s.rows.name in MAPS]
    freshness = Freshness(
        progress=lambda: (loop.stats.passes, loop.stats.audits),
        pending=lambda: any(s.rows.dirty for s in services),
        ready=agent.ready.is_set,
    )

    def eligible() -> bool:
        here = agent.tables.own_node.get(name)
        return here is not None and not here.leaving

    def local_ready(key: ServiceKey, v4: bool) -> int:
        return agent.engine.services.local_ready(key, v4=v4)

    return HealthChecks(agent.tables.services, local_ready, freshness, eligible, agent.config.healthz_listen)


async def _serve_cni(agent: Agent, request: Request) -> bytes:
    """CNI requests from the first moment on: one that can't be served yet waits, and is told why at last: the runtime's
    next attempt would come ten seconds later or more. Raises CniError."""
    if request.command != "STATUS":
        with suppress(TimeoutError):
            await asyncio.wait_for(_can_serve(agent, request.command), CNI_PATIENCE)
    if agent.endpoints is not None:
        return await agent.endpoints.handle(request)
    code = Code.NOT_AVAILABLE if request.command == "STATUS" else Code.TRY_AGAIN_LATER
    missing = "pod addresses from the operator" if agent.registration.addrs else "its addresses from its Node object"
    raise CniError(
        code, "the Fimbria agent is still starting", f"node {agent.config.node_name} is waiting for {missing}"
    )


async def _can_serve(agent: Agent, command: str) -> None:
    """Until a request makes sense: pods are connected once everything is known, and leave as soon as pods are known."""
    if command in ("ADD", "CHECK"):
        await agent.ready.wait()
    while agent.endpoints is None:  # noqa: ASYNC110
        await asyncio.sleep(CNI_PAUSE)


async def _after_ready(agent: Agent, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    await agent.ready.wait()
    await work()


async def _collect(agent: Agent) -> None:
    # Bindings whose connections still stand in a former version's table would be taken for idle.
    if agent.datapath.former:
        await agent.ready.wait()
    await agent.learned.run()


def _own_blocks(agent: Agent) -> tuple[Prefix, ...]:
    node = agent.engine.own_node()
    return node.pod_cidrs if node is not None else ()


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fimbria agent`; returns the exit status."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"fimbria agent: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    # Without root the rest is only a consequence.
    problems = probe.problems() if os.geteuid() == 0 else ["The agent must run as root."]
    if os.geteuid() == 0 and not probe.bpffs_mounted(config.bpffs):
        problems.append(f"{config.bpffs} is not a mounted BPF file system: mount -t bpf bpf {config.bpffs}")
    if problems:
        for problem in problems:
            print(f"fimbria agent: {problem}", file=sys.stderr)
        return 1
    if not config.cgroup and probe.cgroup2_mount() is None:
        log.warning("no cgroup v2 hierarchy is mounted: Services are translated by packet, not at the socket")
    return asyncio.run(_guarded(config))


async def _guarded(config: AgentConfig) -> int:
    task = asyncio.current_task()
    assert task is not None
    stopping = False

    def stop() -> None:
        nonlocal stopping
        stopping = True
        task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await run(config)
    except asyncio.CancelledError:
        if not stopping:
            raise
        log.info("stopped; the datapath goes on")
    except (StartError, OSError, ValueError, BaseExceptionGroup) as error:
        found = _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
        for leaf in found:
            expected = isinstance(leaf, (StartError, OSError, k8s_config.ConfigError))
            log.error("%s", leaf, exc_info=None if expected else leaf)
        return 1
    return 0


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


if __name__ == "__main__":
    sys.exit(main())
