"""Settings of the agent: one frozen value, from the command line and the environment (`FIMBRIA_<NAME>`)."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from fimbria.compute.maglev import DEFAULT_SIZE, TABLE_SIZES
from fimbria.model.labels import LabelFilter
from fimbria.small_http import listen_address


class ConfigError(ValueError):
    """A setting is missing or has a value that can't be used; the text names it."""


LOG_LEVELS: Final = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """Everything an agent can be told. Sizes are entries, times seconds, ports inclusive ranges `FIRST-LAST`."""

    node_name: str = ""
    kubeconfig: str = ""
    cgroup: str = ""
    routing: str = "overlay"
    devices: str = ""
    run_dir: str = "/run/fimbria"
    bpffs: str = "/sys/fs/bpf"
    procfs: str = "/proc"
    cni_conf_dir: str = "/etc/cni/net.d"
    cni_bin_dir: str = "/opt/cni/bin"
    cni_exclusive: bool = False
    cluster_name: str = "default"
    overlay_port: int = 8472
    mtu: int = 0
    masquerade: bool = True
    masquerade_ports: str = "49152-65535"
    node_ports: str = "30000-32767"
    external_cluster_ip: bool = False
    fast_path: bool = True
    attach: str = "auto"
    xdp: str = "disabled"
    reset_tcp: bool = False
    map_memory_ratio: float = 0.0025
    conntrack_entries: int = 0
    nat_entries: int = 0
    affinity_entries: int = 0
    socket_entries: int = 0
    ipcache_entries: int = 524288
    service_entries: int = 131072
    forwarding: str = "snat"
    load_balancing: str = "random"
    socket_services: str = "all"
    maglev_table_size: int = DEFAULT_SIZE
    policy_sets: int = 4096
    identity_entries: int = 65536
    audit_interval: float = 30.0
    metrics_listen: str = ""
    healthz_listen: str = "0.0.0.0:10256"
    probe_listen: str = ""
    trace_interval: float = 5.0
    label_filter: str = ""
    identity_allocation: str = "agent"
    endpoint_slices: bool = True
    log_level: str = "info"

    def check(self) -> None:
        """Raises ConfigError for a value that can't be used."""
        if not self.node_name:
            raise ConfigError("--node-name is not set")
        if self.routing not in ("overlay", "native"):
            raise ConfigError(f"--routing {self.routing!r}: overlay or native")
        if self.attach not in ("auto", "tcx", "clsact"):
            raise ConfigError(f"--attach {self.attach!r}: auto, tcx or clsact")
        if self.xdp not in ("disabled", "native", "generic", "best-effort"):
            raise ConfigError(f"--xdp {self.xdp!r}: disabled, native, generic or best-effort")
        if self.socket_services not in ("all", "host", "off"):
            raise ConfigError(f"--socket-services {self.socket_services!r}: all, host or off")
        if self.maglev_table_size not in TABLE_SIZES:
            listed = ", ".join(map(str, TABLE_SIZES))
            raise ConfigError(f"--maglev-table-size {self.maglev_table_size}: expected one of {listed}")
        port_range("--masquerade-ports", self.masquerade_ports)
        if self.forwarding not in ("snat", "dsr", "hybrid"):
            raise ConfigError(f"--forwarding {self.forwarding!r}: snat, dsr or hybrid")
        if self.load_balancing not in ("random", "maglev"):
            raise ConfigError(f"--load-balancing {self.load_balancing!r}: random or maglev")
        port_range("--node-ports", self.node_ports)
        if self.identity_allocation not in ("agent", "operator"):
            raise ConfigError(f"--identity-allocation {self.identity_allocation!r}: agent or operator")
        if self.log_level not in LOG_LEVELS:
            raise ConfigError(f"--log-level {self.log_level!r}: {', '.join(LOG_LEVELS)}")
        for name, (least, most) in RANGES.items():
            value = getattr(self, name)
            if not least <= value <= most:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected {least} to {most}")
        for setting, text in (
            ("--healthz-listen", self.healthz_listen),
            ("--metrics-listen", self.metrics_listen),
            ("--probe-listen", self.probe_listen),
        ):
            try:
                listen_address(text)
            except ValueError as error:
                raise ConfigError(f"{setting} {error}") from None
        try:
            LabelFilter.of(self.label_filter.split())
        except ValueError as error:
            raise ConfigError(f"--label-filter: {error}") from None

    @property
    def run(self) -> Path:
        """The folder of sockets and journal."""
        return Path(self.run_dir)

    @property
    def overlay(self) -> bool:
        """Whether pods' packets are encapsulated between nodes."""
        return self.routing == "overlay"


_ENTRIES: Final = (1, 1 << 27)
_OWN_ENTRIES: Final = (0, 1 << 27)
RANGES: Final[Mapping[str, tuple[float, float]]] = {
    "overlay_port": (1, 65535), "mtu": (0, 65535), "audit_interval": (0.5, 86400), "trace_interval": (0.001, 86400),
    "conntrack_entries": _OWN_ENTRIES, "nat_entries": _OWN_ENTRIES, "affinity_entries": _OWN_ENTRIES,
    "socket_entries": _OWN_ENTRIES, "map_memory_ratio": (0.0001, 0.5),
    "ipcache_entries": _ENTRIES, "service_entries": _ENTRIES,
    "identity_entries": _ENTRIES, "policy_sets": _ENTRIES,
}  # fmt: skip
HELP: Mapping[str, str] = {
    "node_name": "name of this node's Node object",
    "kubeconfig": "kubeconfig file of the API server; empty: the pod's service account",
    "cgroup": "cgroup v2 folder whose sockets see Services; empty: the cgroup v2 root",
    "routing": "overlay (VXLAN) or native (the network routes pod addresses)",
    "devices": "devices that lead out of the node, comma separated; empty: those that have a node address",
    "run_dir": "folder of sockets and of the journal",
    "bpffs": "where a BPF file system is mounted",
    "procfs": "proc file system through which kernel settings are written; in a container /proc/sys is read-only",
    "cni_conf_dir": "where the container runtime looks for CNI configuration; empty: don't install",
    "cni_bin_dir": "where the container runtime looks for CNI plugins; empty: don't install",
    "cni_exclusive": "set configurations of other network plugins aside (suffix .fimbria_bak)",
    "cluster_name": "name of the cluster in identity labels",
    "overlay_port": "UDP port of VXLAN",
    "mtu": "MTU of the network between nodes in bytes; 0: that of the device",
    "masquerade": "give pods' traffic to the outside the node's address",
    "masquerade_ports": "source ports for masquerading",
    "node_ports": "ports that the API server gives to Services of type NodePort (its --service-node-port-range)",
    "external_cluster_ip": "let clients outside the cluster use cluster IPs",
    "fast_path": "redirect past the host's stack where the kernel can",
    "reset_tcp": "reset TCP connections to a backend that its Service has lost, instead of letting them finish",
    "attach": "how programs are attached to devices: auto, tcx or clsact",
    "xdp": "send Services' traffic from outside on in the network devices' drivers: disabled, native, generic "
    "(after the driver, slow) or best-effort (native where the driver can)",
    "map_memory_ratio": "share of the machine's memory for the tables of connections, unless their sizes are given",
    "conntrack_entries": "size of the connection table; 0: by memory",
    "nat_entries": "size of the table of translated source ports, two rows a connection; 0: by memory",
    "affinity_entries": "size of the table of clients that keep their backend; 0: by memory",
    "socket_entries": "size of the table of sockets that reached a Service; 0: by memory",
    "ipcache_entries": "size of the table of the cluster's addresses",
    "service_entries": "size of the tables of services: twice as many frontends, four times as many backends and slots",
    "forwarding": "service traffic from outside to other nodes: snat, dsr (they answer directly), hybrid (dsr for TCP)",
    "load_balancing": "how connections from outside are spread: random or maglev (consistent on all nodes)",
    "socket_services": "whose sockets see Services at connect: all, host (pods' don't) or off (nor the node's)",
    "maglev_table_size": "entries of each Maglev table, the same on all nodes: a prime, 100 times the backends or more",
    "policy_sets": "how many different sets of rules the pods of a node can have",
    "identity_entries": "size of the table of known identities; pods of others can't talk to pods with policies",
    "audit_interval": "seconds between two comparisons with the kernel",
    "metrics_listen": "HOST:PORT for Prometheus; empty: only on the local socket",
    "healthz_listen": "HOST:PORT of /healthz and /livez, as kube-proxy has them; empty: none",
    "probe_listen": "HOST:PORT of /livez and /readyz for kubelet's probes; empty: none",
    "trace_interval": "seconds between two events of one busy connection",
    "identity_allocation": "who makes identities: agent or operator; the same for agents and operator",
    "endpoint_slices": "learn of other nodes' pods by CiliumEndpointSlices where the operator fills them",
    "label_filter": "security-relevant labels: regular expressions separated by blanks, ! excludes",
    "log_level": "debug, info, warning or error",
}


def port_range(setting: str, text: str) -> tuple[int, int]:
    """`FIRST-LAST` as numbers. Raises ConfigError naming the setting."""
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) < 65536):
        raise ConfigError(f"{setting} {text!r}: expected FIRST-LAST, for example 49152-65535")
    return int(first), int(last)


def _switch(name: str, text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    try:
        return words[text.lower()]
    except KeyError:
        raise ConfigError(f"{name} is {text!r}: expected on or off") from None


def parse(argv: Sequence[str], environ: Mapping[str, str] | None = None) -> AgentConfig:
    """Settings from arguments; a setting that isn't given comes from the environment, then from its default.

    Raises ConfigError; exits on --help as argparse does.
    """
    environ = os.environ if environ is None else environ
    parser = argparse.ArgumentParser("fimbria agent", description="Fimbria's agent: one on every node.")
    defaults = AgentConfig()
    for f in fields(AgentConfig):
        flag = "--" + f.name.replace("_", "-")
        default: Any = getattr(defaults, f.name)
        given = environ.get("FIMBRIA_" + f.name.upper())
        if isinstance(default, bool):
            start = default if given is None else _switch("FIMBRIA_" + f.name.upper(), given)
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=start, help=HELP[f.name])
            continue
        shown = f" (default: {default})" if default not in ("", 0) else ""
        kind = type(default)
        parser.add_argument(flag, type=kind, default=given if given is not None else default, help=HELP[f.name] + shown)
    config = AgentConfig(**vars(parser.parse_args(list(argv))))
    config.check()
    return config
