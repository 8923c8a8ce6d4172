"""The routed network between the nodes: a router namespace with a cable to each member.

The router drops what a cloud's would: packets from an address that isn't the sender's (rp_filter for IPv4, rules for
IPv6, which has no rp_filter), and packets to pods, unless native routing made their ranges known.
"""

import time
from collections.abc import Iterable
from functools import partial
from ipaddress import ip_network

from fimbria.lab import kernel
from fimbria.lab.errors import LabError
from fimbria.lab.layout import LabSpec, Member, Paths

ROUTER = "fabric"
GUARD_PASS, GUARD_DROP = 1000, 2000  # priorities of the IPv6 source rules
ROUTE_PROTO = "170"  # marks the routes that native routing put here

QUIET6 = {f"net/ipv6/conf/{scope}/{key}": "0" for scope in ("all", "default") for key in ("accept_dad", "accept_ra")}
ROUTER_SYSCTLS = QUIET6 | {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/conf/all/rp_filter": "1",
    "net/ipv4/conf/default/rp_filter": "1",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}


def router_lines(spec: LabSpec, paths: Paths) -> list[str]:
    """`ip -batch` lines for the router; they also create the members' ends."""
    # like any router: who asks for what nobody knows hears "unreachable"; only forged sources are met with silence
    lines = ["link set lo up", "-6 route add unreachable default metric 4096"]
    for m in spec.members():
        lines += cable_lines(spec, paths, m) + guard_lines(m)
    return lines


def cable_lines(spec: LabSpec, paths: Paths, m: Member) -> list[str]:
    """The router's side of one member's cable."""
    return [
        f"link add {m.name} mtu {spec.mtu} type veth peer name eth0 mtu {spec.mtu} netns {paths.netns_name(m.name)}",
        f"link set {m.name} up",
        f"address add {m.gateway4}/{m.ipv4_prefix} dev {m.name}",
        f"-6 address add {m.gateway6}/{m.ipv6_prefix} dev {m.name} nodad",
    ]


def guard_lines(m: Member) -> list[str]:
    """Rules that only let a member's own IPv6 sources pass. They name the interface, and so outlive its replacement."""
    return [
        f"-6 rule add pref {GUARD_PASS} iif {m.name} from {subnet6(m)} lookup main",
        f"-6 rule add pref {GUARD_PASS} iif {m.name} from fe80::/10 lookup main",
        f"-6 rule add pref {GUARD_DROP} iif {m.name} blackhole",
    ]


def subnet6(m: Member) -> str:
    return str(ip_network(f"{m.ipv6}/{m.ipv6_prefix}", strict=False))


def member_lines(spec: LabSpec, m: Member) -> list[str]:
    """`ip -batch` lines for a member. The world knows the way to the fabric's own addresses only."""
    lines = [
        "link set lo up",
        "link set eth0 up",
        f"address add {m.ipv4}/{m.ipv4_prefix} dev eth0",
        f"-6 address add {m.ipv6}/{m.ipv6_prefix} dev eth0 nodad",
    ]
    to4, to6 = (spec.fabric_ipv4, spec.fabric_ipv6) if m.name == "world" else ("default", "default")
    return [*lines, f"route add {to4} via {m.gateway4} dev eth0", f"-6 route add {to6} via {m.gateway6} dev eth0"]


def create(spec: LabSpec, paths: Paths) -> None:
    """Namespaces, cables, addresses and routes. Raises LabError."""
    kernel.ip("netns", "add", paths.netns_name(ROUTER))
    kernel.in_netns(paths.netns(ROUTER), partial(kernel.write_sysctls, ROUTER_SYSCTLS))
    for m in spec.members():
        _namespace(paths, m)
    kernel.ip_batch(paths.netns_name(ROUTER), router_lines(spec, paths))
    for m in spec.members():
        kernel.ip_batch(paths.netns_name(m.name), member_lines(spec, m))


def _namespace(paths: Paths, m: Member) -> None:
    kernel.ip("netns", "add", paths.netns_name(m.name))
    kernel.in_netns(paths.netns(m.name), partial(kernel.write_sysctls, QUIET6))


def replace_member(spec: LabSpec, paths: Paths, m: Member) -> None:
    """A namespace and cable as new, for a node that boots again. Raises LabError."""
    kernel.ip("netns", "delete", paths.netns_name(m.name))
    _namespace(paths, m)
    for _ in range(200):  # the kernel takes the old cable away when it gets round to it
        try:
            kernel.ip_batch(paths.netns_name(ROUTER), cable_lines(spec, paths, m)[:1])
            break
        except LabError as e:
            if "File exists" not in str(e):
                raise
            time.sleep(0.02)
    kernel.ip_batch(paths.netns_name(ROUTER), cable_lines(spec, paths, m)[1:])
    kernel.ip_batch(paths.netns_name(m.name), member_lines(spec, m))


def route_changes(spec: LabSpec, before: Iterable[tuple[str, str]], after: Iterable[tuple[str, str]]) -> list[str]:
    """`ip -batch` lines that turn the cloud's route table from one set of (pod CIDR, node) into another.

    For IPv6 a node may then also send from the range; IPv4's rp_filter follows the routes by itself.
    """
    old, new = set(before), set(after)
    return [line for cidr, node in sorted(old - new) for line in _without_route(cidr, node)] + [
        line for cidr, node in sorted(new - old) for line in _with_route(spec.node(node), cidr)
    ]


def _without_route(cidr: str, node: str) -> list[str]:
    if ":" not in cidr:
        return [f"route del {cidr} dev {node} proto {ROUTE_PROTO}"]
    return [
        f"-6 route del {cidr} dev {node} proto {ROUTE_PROTO}",
        f"-6 rule del pref {GUARD_PASS} iif {node} from {cidr} lookup main protocol {ROUTE_PROTO}",
    ]


def _with_route(m: Member, cidr: str) -> list[str]:
    if ":" not in cidr:
        return [f"route replace {cidr} via {m.ipv4} dev {m.name} proto {ROUTE_PROTO}"]
    return [
        f"-6 route replace {cidr} via {m.ipv6} dev {m.name} proto {ROUTE_PROTO}",
        f"-6 rule add pref {GUARD_PASS} iif {m.name} from {cidr} lookup main protocol {ROUTE_PROTO}",
    ]


def forget_routes() -> list[str]:
    """`ip -batch` lines that remove whatever native routing put here: a new watcher starts from nothing."""
    return [
        f"route flush proto {ROUTE_PROTO}",
        f"-6 route flush proto {ROUTE_PROTO}",
        f"-6 rule flush protocol {ROUTE_PROTO}",
    ]
