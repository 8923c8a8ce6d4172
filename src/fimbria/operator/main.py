"""The operator's composition root: pod blocks, slices of endpoints, identities, collection of what is unused, and the
status of policies."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

from fimbria.decide.identity import IdentityCollector
from fimbria.decide.node_blocks import BlockAllocator
from fimbria.model.labels import LabelFilter
from fimbria.operator.blocks import NodeBlockWriter
from fimbria.operator.collect import Collector
from fimbria.operator.config import ConfigError, OperatorConfig, parse
from fimbria.operator.endpoint_slices import EndpointSliceWriter, withdraw
from fimbria.operator.health import OperatorHealth
from fimbria.operator.identities import IdentityMaker
from fimbria.operator.metrics import OperatorMetrics
from fimbria.operator.policies import (
    Finding,
    NetworkPolicyEvents,
    PolicyStatusWriter,
    Verdict,
    inspect,
    judge,
)
from fimbria.operator.taints import AGENT_PODS, AgentPod, NodeState, TaintKeeper, Wishes, agent_pod, node_state
from fimbria.operator.view import ClusterView
from fimbria.sources.k8s import config as k8s_config
from fimbria.sources.k8s import resources
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.events import EventRecorder
from fimbria.sources.k8s.identities import IdentitySearch
from fimbria.sources.k8s.informer import Informer
from fimbria.sources.k8s.leader import LeaderElection, LeadershipLost
from fimbria.sources.k8s.policies import Vocabulary
from fimbria.sources.k8s.redirects import local_redirect
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.rows import object_key
from fimbria.sources.k8s.types.cilium import CiliumNode
from fimbria.sources.k8s.types.meta import ObjectMeta
from fimbria.tables.table import Table

log = logging.getLogger("fimbria.operator")
LEASE: Final = "fimbria-operator"


class Operator:
    """One replica: what it follows all the time, and what it does while it leads.

    `election_client` is another connection with a rate of its own: a busy leader must not lose its lease over its work.
    """

    def __init__(self, config: OperatorConfig, client: ApiClient, election_client: ApiClient) -> None:
        self.config = config
        self.client = client
        self.election: LeaderElection | None = None
        self.working = False
        self.collector: Collector | None = None
        self.metrics = OperatorMetrics(lambda: self.working)
        self.events = EventRecorder(client, component="fimbria-operator", host=os.uname().nodename)
        self.words = vocabulary(config)
        self.view = ClusterView(
            self._follow, slices=config.endpoint_slices, pods=config.identity_allocation == "operator"
        )
        if config.leader_elect:
            # In containers all have the number 1: one that is ending must not be taken for the one after it.
            me = f"{os.uname().nodename}_{secrets.token_hex(8)}"
            self.election = LeaderElection(election_client, namespace=config.namespace, name=LEASE, identity=me)
            client.guard = self._fence

    async def run(self) -> None:
        """Until stopped. Raises LeadershipLost, OSError of a port."""
        config = self.config
        health = OperatorHealth(
            self.alive, self.ready, self.metrics.exposition, config.healthz_listen, config.metrics_listen, self.warning
        )
        async with asyncio.TaskGroup() as group:
            serving = [group.create_task(health.run()), *(group.create_task(i.run()) for i in self.view.informers)]
            await (self.election.run(self.lead) if self.election is not None else self.lead())
            for task in serving:
                task.cancel()

    def _fence(self, what: str) -> None:
        """Raises LeadershipLost: nothing is written by who doesn't hold the lease at this moment."""
        if self.election is not None and not self.election.holds():
            raise LeadershipLost(f"{what}: not without the lease")

    def alive(self) -> str:
        """What is wrong with this process, "" for nothing."""
        overdue = self.election is not None and self.working and not self.election.holds()
        return "the lease is overdue" if overdue else ""

    def ready(self) -> str:
        """What keeps this replica from working, "" for nothing."""
        if self.election is not None and not self.election.holder:
            return self.election.error or "nobody is known to hold the lease yet"
        missing = [i.resource.plural for i in self.metrics.informers if not i.table.synced]
        return f"not seen yet: {', '.join(missing)}" if missing else ""

    def warning(self) -> str:
        """What will go wrong, "" for nothing."""
        return self.collector.warning if self.collector is not None and self.working else ""

    async def lead(self) -> None:
        """Everything the leader does, until cancelled."""
        self.working = True
        try:
            await self._work()
        finally:
            self.working = False

    async def _work(self) -> None:
        config, client = self.config, self.client
        nodes: Table[str, CiliumNode] = Table("nodes")
        async with asyncio.TaskGroup() as group:
            # Listed anew by every leader: a block that the former one gave a moment ago must not be given again.
            follow_nodes = self._follow(resources.CILIUM_NODES, nodes, lambda n: n, key=lambda m: m.name)
            group.create_task(follow_nodes.run())
            group.create_task(NodeBlockWriter(client, nodes, BlockAllocator(config.pools)).run())
            self._keep_endpoints(group, nodes)
            self._keep_identities(group, nodes)
            self._judge_policies(group)
            wishes = Wishes(config.agent_taint, config.remove_taints, config.set_taints, config.set_network_status)
            if wishes:
                self._keep_taints(group, wishes)

    def _keep_endpoints(self, group: asyncio.TaskGroup, nodes: Table[str, CiliumNode]) -> None:
        view = self.view
        if not self.config.endpoint_slices:
            group.create_task(withdraw(self.client))
            return
        writer = EndpointSliceWriter(self.client, view.endpoints, view.slices, view.namespaces, nodes)
        self.metrics.parts.append(writer.metrics)
        group.create_task(writer.run())

    def _keep_identities(self, group: asyncio.TaskGroup, nodes: Table[str, CiliumNode]) -> None:
        config, view = self.config, self.view
        collector = Collector(
            self.client, view.identities, view.endpoints, nodes, IdentityCollector(config.identity_grace),
            config.collect_interval, config.collect_rate, view.current, tell=self._identities_run_out,
        )  # fmt: skip
        self.collector = collector
        if view.pods is not None:
            search = IdentitySearch(self.client)
            maker = IdentityMaker(
                search, view.pods, view.namespaces, view.identities, self.words.labels, config.cluster_name
            )
            collector.wanted = maker.wanted
            self.metrics.parts.append(maker.metrics)
            group.create_task(maker.run())
        self.metrics.parts.append(collector.metrics)
        group.create_task(collector.run())

    def _judge_policies(self, group: asyncio.TaskGroup) -> None:
        client, words = self.client, self.words
        policies: tuple[tuple[Resource[Any], Any], ...] = (
            (resources.CILIUM_NETWORK_POLICIES, judge(words)),
            (resources.CILIUM_CLUSTERWIDE_NETWORK_POLICIES, judge(words)),
            (resources.CILIUM_LOCAL_REDIRECT_POLICIES, judge(words, local_redirect)),
        )
        for resource, judgement in policies:
            verdicts: Table[Any, Verdict] = Table(resource.plural)
            group.create_task(self._follow(resource, verdicts, judgement, key=object_key).run())
            group.create_task(PolicyStatusWriter(client, resource, verdicts).run())
        findings: Table[Any, Finding] = Table("networkpolicies")
        follow_policies = self._follow(resources.NETWORK_POLICIES, findings, inspect(words), key=object_key)
        group.create_task(follow_policies.run())
        group.create_task(NetworkPolicyEvents(self.events, findings).run())
        group.create_task(self.events.run())

    def _keep_taints(self, group: asyncio.TaskGroup, wishes: Wishes) -> None:
        nodes: Table[str, NodeState] = Table("cluster nodes")
        agents: Table[tuple[str, str], AgentPod] = Table("agents")
        agents.add_index("node", lambda pod: (pod.node,))
        follow_nodes = self._follow(resources.NODES, nodes, node_state, key=lambda m: m.name)
        follow_agents = self._follow(
            resources.PODS, agents, agent_pod, key=object_key, namespace=self.config.namespace, labels=AGENT_PODS
        )
        group.create_task(follow_nodes.run())
        group.create_task(follow_agents.run())
        group.create_task(TaintKeeper(self.client, wishes, nodes, agents).run())

    def _follow(
        self, resource: Resource[Any], table: Table[Any, Any], transform: Any, **options: Any
    ) -> Informer[Any, Any, Any]:
        informer: Informer[Any, Any, Any] = Informer(self.client, resource, table, transform, **options)
        self.metrics.informers.append(informer)
        informer.tell = partial(self._unusable, resource)
        return informer

    def _identities_run_out(self, text: str) -> None:
        lease = ObjectMeta(namespace=self.config.namespace, name=LEASE)
        self.events.emit(resources.LEASES, lease, "Warning", "IdentitiesRunOut", text)

    def _unusable(self, resource: Resource[Any], meta: ObjectMeta, error: str) -> None:
        """Every agent has it in its log; one of us tells whoever looks at the object."""
        if self.working:
            self.events.emit(resource, meta, "Warning", "Unusable", error)


def vocabulary(config: OperatorConfig) -> Vocabulary:
    """What labels mean to policies: as to the agents."""
    return Vocabulary(LabelFilter.of(config.label_filter.split()), config.cluster_name)


async def run(config: OperatorConfig) -> None:
    """Run until stopped. Raises ConfigError of the kubeconfig, LeadershipLost, OSError of a port."""
    cluster = k8s_config.load(config.kubeconfig or None)
    async with (
        ApiClient(cluster, component="operator", rate=200.0, burst=400) as client,
        ApiClient(cluster, component="operator", timeout=5.0, retries=0, connections=2) as election,
    ):
        log.info("pools: %s", ", ".join(map(str, config.pools)))
        await Operator(config, client, election).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fimbria operator`; returns the exit status."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
    except ConfigError as error:
        print(f"fimbria operator: {error}", file=sys.stderr)
        return 2
    logging.basicConfig(
        level=config.log_level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    )
    return asyncio.run(_until_stopped(config))


async def _until_stopped(config: OperatorConfig) -> int:
    task = asyncio.create_task(run(config))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log.info("stopped")
    except k8s_config.ConfigError as error:
        log.error("%s", error)
        return 1
    except BaseExceptionGroup as group:
        expected, rest = group.split((LeadershipLost, OSError))
        if rest is not None:
            raise rest from None
        for leaf in leaves(expected):
            log.error("%s", leaf)
        return 1
    return 0


def leaves(group: BaseExceptionGroup[Any] | None) -> list[BaseException]:
    """The exceptions within a group and its groups."""
    found: list[BaseException] = []
    for error in group.exceptions if group is not None else ():
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
