"""The operator's composition root: pod blocks, collection of what is unused, and the status of policies."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, Final

from fimbria.decide.identity import IdentityCollector
from fimbria.decide.node_blocks import BlockAllocator
from fimbria.model.labels import DEFAULT_FILTER
from fimbria.operator.blocks import NodeBlockWriter
from fimbria.operator.collect import Collector
from fimbria.operator.config import ConfigError, OperatorConfig, parse
from fimbria.operator.policies import (
    Finding,
    NetworkPolicyEvents,
    PolicyStatusWriter,
    Verdict,
    inspect,
    judge,
)
from fimbria.sources.k8s import config as k8s_config
from fimbria.sources.k8s import resources
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.events import EventRecorder
from fimbria.sources.k8s.informer import Informer
from fimbria.sources.k8s.leader import LeaderElection, LeadershipLost
from fimbria.sources.k8s.policies import Vocabulary
from fimbria.sources.k8s.redirects import local_redirect
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.rows import object_key
from fimbria.sources.k8s.types.cilium import CiliumNode
from fimbria.tables.table import Table

log = logging.getLogger("fimbria.operator")
LEASE: Final = "fimbria-operator"


async def lead(config: OperatorConfig, client: ApiClient) -> None:
    """Everything the leader does, until cancelled."""
    nodes: Table[str, CiliumNode] = Table("nodes")
    words = Vocabulary(DEFAULT_FILTER, config.cluster_name)
    collector = Collector(client, IdentityCollector(config.identity_grace), config.collect_interval)
    async with asyncio.TaskGroup() as group:
        follow_nodes = Informer(client, resources.CILIUM_NODES, nodes, lambda n: n, key=lambda m: m.name)
        group.create_task(follow_nodes.run())
        group.create_task(NodeBlockWriter(client, nodes, BlockAllocator(config.pools)).run())
        group.create_task(collector.run())
        policies: tuple[tuple[Resource[Any], Any], ...] = (
            (resources.CILIUM_NETWORK_POLICIES, judge(words)),
            (resources.CILIUM_CLUSTERWIDE_NETWORK_POLICIES, judge(words)),
            (resources.CILIUM_LOCAL_REDIRECT_POLICIES, judge(words, local_redirect)),
        )
        for resource, judgement in policies:
            verdicts: Table[Any, Verdict] = Table(resource.plural)
            follow: Informer[Any, Any, Verdict] = Informer(client, resource, verdicts, judgement, key=object_key)
            group.create_task(follow.run())
            group.create_task(PolicyStatusWriter(client, resource, verdicts).run())
        events = EventRecorder(client, component="fimbria-operator", host=os.uname().nodename)
        findings: Table[Any, Finding] = Table("networkpolicies")
        follow_policies: Informer[Any, Any, Finding] = Informer(
            client, resources.NETWORK_POLICIES, findings, inspect(words), key=object_key
        )
        group.create_task(follow_policies.run())
        group.create_task(NetworkPolicyEvents(events, findings).run())
        group.create_task(events.run())


async def run(config: OperatorConfig) -> None:
    """Run until stopped. Raises ConfigError of the kubeconfig, LeadershipLost."""
    cluster = k8s_config.load(config.kubeconfig or None)
    async with ApiClient(cluster, component="operator", rate=200.0, burst=400) as client:
        log.info("pools: %s", ", ".join(map(str, config.pools)))
        if not config.leader_elect:
            await lead(config, client)
            return
        me = f"{os.uname().nodename}_{os.getpid()}"
        election = LeaderElection(client, namespace=config.namespace, name=LEASE, identity=me)
        await election.run(lambda: lead(config, client))


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
    except (k8s_config.ConfigError, LeadershipLost) as error:
        log.error("%s", error)
        return 1
    return 0
