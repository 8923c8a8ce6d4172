"""Settings of the operator, from the command line and the environment (`FIMBRIA_<NAME>`)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from fimbria.decide.node_blocks import Pool, PoolError, check_pools
from fimbria.model.labels import LabelFilter
from fimbria.small_http import listen_address

ON: Final = ("1", "true", "yes", "on")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")


class ConfigError(ValueError):
    """A setting can't be used; the text names it."""


@dataclass(frozen=True, slots=True)
class OperatorConfig:
    """Everything an operator can be told; times in seconds."""

    kubeconfig: str
    pools: tuple[Pool, ...]
    leader_elect: bool
    namespace: str
    identity_allocation: str
    label_filter: str
    endpoint_slices: bool
    identity_grace: float
    collect_interval: float
    collect_rate: float
    cluster_name: str
    metrics_listen: str
    healthz_listen: str
    agent_taint: str
    remove_taints: bool
    set_taints: bool
    set_network_status: bool
    log_level: str


def parse(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> OperatorConfig:
    """Settings from arguments, then environment, then defaults. Raises ConfigError; exits on --help."""
    env = os.environ if environ is None else environ
    p = argparse.ArgumentParser("fimbria operator", description="Fimbria's operator: decides once per cluster.")

    def add(name: str, default: str, text: str) -> None:
        shown = f" (default: {default})" if default else ""
        p.add_argument(
            name, default=env.get("FIMBRIA_" + name[2:].upper().replace("-", "_"), default), help=text + shown
        )

    add("--kubeconfig", "", "kubeconfig file of the API server; empty: the pod's service account")
    add("--ipv4-pool", "10.244.0.0/16", "IPv4 networks for pods, comma separated; empty: none")
    add("--ipv4-mask", "24", "prefix length of one node's IPv4 block")
    add("--ipv6-pool", "", "IPv6 networks for pods, comma separated; empty: none")
    add("--ipv6-mask", "64", "prefix length of one node's IPv6 block")
    add("--namespace", "kube-system", "namespace of the leader's Lease and of the agents' pods")
    add("--identity-allocation", "agent", "who makes identities: agent or operator; the same for agents and operator")
    add("--label-filter", "", "security-relevant labels as the agents' --label-filter says")
    add("--identity-grace", "900", "seconds that an unused identity is kept")
    add("--collect-interval", "60", "seconds between two looks for what nobody uses any more")
    add("--collect-rate", "20", "requests a second for removing it")
    add("--cluster-name", "default", "name of the cluster in identity labels")
    add("--metrics-listen", "", "HOST:PORT for Prometheus; empty: none")
    add("--healthz-listen", "", "HOST:PORT of /livez, /readyz and /healthz; empty: none")
    add("--agent-taint", "node.cilium.io/agent-not-ready", "taint of nodes whose agent isn't ready")
    add("--log-level", "info", "debug, info, warning or error")
    for switch, text in (
        ("--leader-elect", "run one of several"),
        ("--remove-taints", "take --agent-taint from nodes whose agent is ready"),
        ("--set-taints", "give --agent-taint to nodes whose agent hasn't been ready for a minute"),
        ("--set-network-status", "set the condition NetworkUnavailable to False on nodes whose agent is ready"),
    ):
        p.add_argument(switch, action=argparse.BooleanOptionalAction, default=False, help=text)
    given = env.get("FIMBRIA_ENDPOINT_SLICES", "on").lower()
    text = "batch CiliumEndpoints into CiliumEndpointSlices, which agents follow instead (default: on)"
    p.add_argument("--endpoint-slices", action=argparse.BooleanOptionalAction, default=given in ON, help=text)
    a = p.parse_args(list(argv))
    try:
        pools = (*_pools(a.ipv4_pool, a.ipv4_mask, v4=True), *_pools(a.ipv6_pool, a.ipv6_mask, v4=False))
        check_pools(pools)
        grace = _number("--identity-grace", a.identity_grace)
        interval = _number("--collect-interval", a.collect_interval)
        rate = _number("--collect-rate", a.collect_rate)
    except (PoolError, ValueError) as error:
        raise ConfigError(str(error)) from None
    if min(interval, rate) <= 0:
        raise ConfigError("--collect-interval and --collect-rate: expected more than 0")
    if not pools:
        raise ConfigError("neither --ipv4-pool nor --ipv6-pool is set: pods would get no addresses")
    _check(a)
    return OperatorConfig(
        a.kubeconfig, pools, a.leader_elect, a.namespace, a.identity_allocation, a.label_filter, a.endpoint_slices,
        grace, interval, rate, a.cluster_name,
        a.metrics_listen, a.healthz_listen, a.agent_taint, a.remove_taints, a.set_taints, a.set_network_status,
        a.log_level,
    )  # fmt: skip


def _check(a: argparse.Namespace) -> None:
    """Raises ConfigError for a word that means nothing."""
    if a.identity_allocation not in ("agent", "operator"):
        raise ConfigError(f"--identity-allocation {a.identity_allocation!r}: agent or operator")
    try:
        LabelFilter.of(a.label_filter.split())
    except ValueError as error:
        raise ConfigError(f"--label-filter: {error}") from None
    for setting, text in (("--healthz-listen", a.healthz_listen), ("--metrics-listen", a.metrics_listen)):
        try:
            listen_address(text)
        except ValueError as error:
            raise ConfigError(f"{setting} {error}") from None
    if a.log_level not in LOG_LEVELS:
        raise ConfigError(f"--log-level {a.log_level!r}: {', '.join(LOG_LEVELS)}")


def _number(setting: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{setting} {text!r}: expected a number") from None


def _pools(networks: str, mask: str, *, v4: bool) -> tuple[Pool, ...]:
    pools = tuple(Pool.parse(f"{n.strip()}/{mask}") for n in networks.split(",") if n.strip())
    for pool in pools:
        if pool.network.v4 != v4:
            raise PoolError(f"pool {pool} is not of family IPv{4 if v4 else 6}")
    return pools
