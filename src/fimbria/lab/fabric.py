"""The routed network between the nodes: a router namespace with a cable to each member.

The router drops what a cloud's would: packets from an address that isn't the sender's (by rules of policy routing: they
hold for both families, and unlike rp_filter let several nodes answer from a load balancer's address), and packets to
pods, unless native routing made their ranges known.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from ipaddress import ip_address, ip_network

from fimbria.lab import kernel
from fimbria.lab.layout import BALANCER4, BALANCER6, LabSpec, Member, Paths

ROUTER = "fabric"
GUARD_PASS, GUARD_DROP = 1000, 2000  # priorities of the source rules
ROUTE_PROTO, BALANCER_PROTO = "170", "171"  # mark the routes that native routing and load balancers put here
Balancing = Mapping[str, frozenset[str]]  # a load balancer's address -> the nodes that it leads to

QUIET6 = {f"net/ipv6/conf/{scope}/{key}": "0" for scope in ("all", "default") for key in ("accept_dad", "accept_ra")}
ROUTER_SYSCTLS = QUIET6 | {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/fib_multipath_hash_policy": "1",  # by ports too: connections of one client spread over the nodes
    "net/ipv6/fib_multipath_hash_policy": "1",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}


def router_lines(spec: LabSpec, paths: Paths) -> list[str]:
    """`ip -batch` lines for the router; they also create the members' ends."""
    # like any router: who asks for what nobody knows hears "unreachable"; only forged sources are met with silence
    lines = ["link set lo up"] + [f"{f}route add unreachable default metric 4096" for f in ("", "-6 ")]
    for m in spec.members():
        lines += cable_lines(spec, paths, m) + guard_lines(spec, m)
    return lines


def cable_lines(spec: LabSpec, paths: Paths, m: Member) -> list[str]:
    """The router's side of one member's cable."""
    return [
        f"link add {m.name} mtu {spec.mtu} type veth peer name eth0 mtu {spec.mtu} netns {paths.netns_name(m.name)}",
        f"link set {m.name} up",
        f"address add {m.gateway4}/{m.ipv4_prefix} dev {m.name}",
        f"-6 address add {m.gateway6}/{m.ipv6_prefix} dev {m.name} nodad",
    ]


def guard_lines(spec: LabSpec, m: Member) -> list[str]:
    """Rules that only let a member's own sources pass, and a load balancer's from nodes. They name the interface, and
    so outlive its replacement."""
    if m.name in spec.node_names and not spec.source_check:
        return []
    subnets = [ip_network(f"{a}/{n}", strict=False) for a, n in ((m.ipv4, m.ipv4_prefix), (m.ipv6, m.ipv6_prefix))]
    own = [*map(str, subnets), "fe80::/10"] + ([str(BALANCER4), str(BALANCER6)] if m.name in spec.node_names else [])
    passing = [f"{_family(net)}rule add pref {GUARD_PASS} iif {m.name} from {net} lookup main" for net in own]
    return passing + [f"{family}rule add pref {GUARD_DROP} iif {m.name} blackhole" for family in ("", "-6 ")]


def _family(address: str) -> str:
    return "-6 " if ":" in address else ""


def member_lines(spec: LabSpec, m: Member) -> list[str]:
    """`ip -batch` lines for a member. The world knows the way to the fabric's and load balancers' addresses only."""
    lines = [
        "link set lo up",
        "link set eth0 up",
        f"address add {m.ipv4}/{m.ipv4_prefix} dev eth0",
        f"-6 address add {m.ipv6}/{m.ipv6_prefix} dev eth0 nodad",
    ]
    ways = (("", m.gateway4, (spec.fabric_ipv4, BALANCER4)), ("-6 ", m.gateway6, (spec.fabric_ipv6, BALANCER6)))
    for family, via, known in ways:
        lines += [f"{family}route add {to} via {via} dev eth0" for to in (known if m.name == "world" else ("default",))]
    return lines


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
    # taken out first: the kernel may keep the old namespace for minutes, for orphaned connections that nobody ends
    kernel.ip("-n", paths.netns_name(ROUTER), "link", "delete", m.name)
    kernel.ip("netns", "delete", paths.netns_name(m.name))
    _namespace(paths, m)
    kernel.ip_batch(paths.netns_name(ROUTER), cable_lines(spec, paths, m))
    kernel.ip_batch(paths.netns_name(m.name), member_lines(spec, m))


def route_changes(spec: LabSpec, before: Iterable[tuple[str, str]], after: Iterable[tuple[str, str]]) -> list[str]:
    """`ip -batch` lines that turn the cloud's route table from one set of (pod CIDR, node) into another.

    A node may then also send from the range.
    """
    old, new = set(before), set(after)
    return [line for cidr, node in sorted(old - new) for line in _without_route(cidr, node)] + [
        line for cidr, node in sorted(new - old) for line in _with_route(spec.node(node), cidr)
    ]


def _without_route(cidr: str, node: str) -> list[str]:
    return [
        f"{_family(cidr)}route del {cidr} dev {node} proto {ROUTE_PROTO}",
        f"{_family(cidr)}rule del pref {GUARD_PASS} iif {node} from {cidr} lookup main protocol {ROUTE_PROTO}",
    ]


def _with_route(m: Member, cidr: str) -> list[str]:
    via = m.ipv6 if ":" in cidr else m.ipv4
    return [
        f"{_family(cidr)}route replace {cidr} via {via} dev {m.name} proto {ROUTE_PROTO}",
        f"{_family(cidr)}rule add pref {GUARD_PASS} iif {m.name} from {cidr} lookup main protocol {ROUTE_PROTO}",
    ]


def forget_routes() -> list[str]:
    """`ip -batch` lines that remove whatever native routing put here: a new watcher starts from nothing."""
    return [
        f"{family}{what}" for family in ("", "-6 ")
        for what in (f"route flush proto {ROUTE_PROTO}", f"rule flush protocol {ROUTE_PROTO}")
    ]  # fmt: skip


# --- load balancers ------------------------------------------------------------------------------------------------


def balancer_changes(spec: LabSpec, before: Balancing, after: Balancing) -> list[str]:
    """`ip -batch` lines, of no family, that lead each load balancer's address to its nodes.

    A group of next hops is resilient: connections stay with their node for as long as it is in the group, whoever else
    comes or goes (kernel documentation, networking/nexthop-group-resilient). An address without nodes is unreachable.
    """
    lines = [] if before or not after else [line for node in spec.node_names for line in _hops(spec, node)]
    for address in sorted(before.keys() - {a for a, nodes in after.items() if nodes}):
        if before[address]:
            lines.append(f"nexthop del id {_group(address)}")  # the route goes with it
    for address, nodes in sorted(after.items()):
        if nodes and nodes != before.get(address):
            hops = "/".join(str(_hop(spec, node, ":" in address)) for node in sorted(nodes))
            lines.append(f"nexthop replace id {_group(address)} group {hops} type resilient buckets 128 idle_timer 120")
            lines.append(f"route replace {ip_network(address)} nhid {_group(address)} proto {BALANCER_PROTO}")
    return lines


def forget_balancers() -> list[str]:
    """`ip -batch` lines, of no family, that remove them all."""
    return ["nexthop flush"]


def _hops(spec: LabSpec, node: str) -> list[str]:
    m = spec.node(node)
    return [
        f"nexthop replace id {_hop(spec, node, six)} via {via} dev {node}"
        for six, via in ((False, m.ipv4), (True, m.ipv6))
    ]


def _hop(spec: LabSpec, node: str, six: bool) -> int:
    return 2 * spec.node_names.index(node) + six + 1


def _group(address: str) -> int:
    """Numbers above all nodes', different for each address of both pools."""
    at = ip_address(address)
    pool = BALANCER6 if at.version == 6 else BALANCER4
    return (1 << 16) * at.version + int(at) - int(pool.network_address)
