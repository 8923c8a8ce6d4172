"""What is tested: servers, clients, policies, and each connection with what must come of it. Pure.

Every connection is attempted twice, without policies and with them: a connection that policies must deny is known to
work without them, so it can't be "denied" by a server that is simply down.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

HTTP_PORT: Final = 8080
TCP_PORT: Final = 8081
UDP_PORT: Final = 8082
PORTS: Final = {"http": HTTP_PORT, "tcp": TCP_PORT, "udp": UDP_PORT}
SERVICE_PORT: Final = 80
PAIR: Final = ("near", "far")  # who is behind the services that have two backends
LAST: Final = {4: 32, 6: 128}  # prefix length of a single address


@dataclass(frozen=True, slots=True)
class Server:
    """A pod that answers. `node` is the index of its node: 0 is the clients' own. `host`: on the node's network."""

    name: str
    node: int
    host: bool = False


@dataclass(frozen=True, slots=True)
class Client:
    """Labels of the pods that try; they run on node 0."""

    name: str
    host: bool = False


# Which policy holds for which of them is in `policies`.
SERVERS: Final = (
    Server("near", 0),
    Server("far", 1),
    Server("guarded", 1),
    Server("closed", 1),
    Server("fenced", 1),
    Server("barred", 1),
    Server("porter", 1),
    Server("host-near", 0, host=True),
    Server("host-far", 1, host=True),
)
SERVICES: Final = ("near", "far", "guarded")  # with the server of the same name behind it
SPREAD, STICKY, HEADLESS, BALANCED = "pair", "sticky", "headless", "balanced"  # with both of PAIR behind it
CLIENTS: Final = (
    Client("plain"),
    Client("friend"),
    Client("walled"),
    Client("caged"),
    Client("host", host=True),
)


@dataclass(frozen=True, slots=True)
class External:
    """Something outside the cluster that is asked to be reached."""

    proto: str
    address: str
    port: int

    @property
    def family(self) -> int:
        """4 or 6."""
        return ipaddress.ip_address(self.address).version


@dataclass(frozen=True, slots=True)
class Places:
    """Where everything is: addresses by name and family (4, 6), and node ports of services by name."""

    pods: Mapping[str, Mapping[int, str]]
    services: Mapping[str, Mapping[int, str]]
    host_port: int
    external: External | None = None
    node_ports: Mapping[str, int] = field(default_factory=dict)
    namespace: str = ""
    mapped_port: int = 0  # the node's port that leads to the porter; 0: none
    names: bool = False  # whether the cluster has DNS
    cilium: bool = False  # whether it has Cilium's policies


@dataclass(frozen=True, slots=True)
class Probe:
    """One connection: `allowed` says what must come of it with policies; without them all must succeed.

    `proto` is what the prober does; `want` are the servers that may answer, or a name's addresses.
    """

    check: str
    client: str
    target: str
    proto: str
    address: str
    port: int
    allowed: bool = True
    family: int = field(default=4)
    want: tuple[str, ...] = ()


def parse_external(text: str) -> External:
    """`[PROTO://]ADDRESS:PORT`, PROTO http (default), tcp or udp. Raises ValueError saying what is expected."""
    proto, scheme, rest = text.rpartition("://")
    host, colon, port = rest.rpartition(":")
    try:
        address = str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        address = ""
    if not (address and colon and port.isdecimal() and 0 < int(port) < 65536) or (scheme and proto not in PORTS):
        raise ValueError(f"{text!r}: expected [http|tcp|udp://]ADDRESS:PORT, for example http://192.0.2.1:80")
    return External(proto or "http", address, int(port))


def probes(places: Places) -> list[Probe]:
    """All connections, for each family that both ends have: nodes may have one that pods haven't."""
    found: list[Probe] = []
    for family in sorted(places.pods.get("near", {})):
        found += _to_pods(places, family)
        found += _to_services(places, family)
        found += _to_node_ports(places, family)
        found += _to_services_with_two(places, family)
        found += _by_name(places, family)
        found += _from_and_to_nodes(places, family)
        found += _policies(places, family)
        found += _cilium_policies(places, family)
    if places.external is not None:
        e = places.external
        found.append(
            Probe("to the outside", "plain", f"{e.address}:{e.port}", e.proto, e.address, e.port, True, e.family)
        )
    return found


def _pod(
    places: Places, family: int, check: str, client: str, server: str, *, proto: str = "http", allowed: bool = True
) -> Iterator[Probe]:
    address = places.pods.get(server, {}).get(family)
    if address:
        want = (server,) if proto == "http" else ()
        yield Probe(check, client, f"pod {server}", proto, address, PORTS[proto], allowed, family, want)


def _service(
    places: Places, family: int, check: str, client: str, name: str, *, allowed: bool = True
) -> Iterator[Probe]:
    address = places.services.get(name, {}).get(family)
    if address:
        yield Probe(check, client, f"service {name}", "http", address, SERVICE_PORT, allowed, family, (name,))


def _to_pods(places: Places, family: int) -> Iterator[Probe]:
    for proto in PORTS:
        yield from _pod(places, family, "pod to pod, same node", "plain", "near", proto=proto)
        yield from _pod(places, family, "pod to pod, other node", "plain", "far", proto=proto)


def _to_services(places: Places, family: int) -> Iterator[Probe]:
    yield from _service(places, family, "service, backend on same node", "plain", "near")
    yield from _service(places, family, "service, backend on other node", "plain", "far")
    yield from _service(places, family, "service, from a node", "host", "far")


def _to_node_ports(places: Places, family: int) -> Iterator[Probe]:
    """Through the clients' node and the servers' node, to backends on either: half of them leave the node again."""
    for node, where in (("host-near", "its own node"), ("host-far", "another node")):
        address = places.pods.get(node, {}).get(family)
        for name in ("near", "far"):
            port = places.node_ports.get(name)
            if address and port:
                what = f"service {name}", "http", address, port, True, family, (name,)
                yield Probe(f"node port of {where}", "plain", *what)
                yield Probe(f"node port of {where}, from a node", "host", *what)


def _to_services_with_two(places: Places, family: int) -> Iterator[Probe]:
    for check, name, proto in (
        ("service, both backends are used", SPREAD, "spread"),
        ("service, session affinity", STICKY, "same"),
        ("load balancer", BALANCED, "http"),
    ):
        address = places.services.get(name, {}).get(family)
        if address:
            for client in ("plain", "host"):
                what = f"service {name}", proto, address, SERVICE_PORT, True, family, PAIR
                yield Probe(check, client, *what)
    address = places.services.get("kubernetes", {}).get(family)
    if address:
        yield Probe("service of the API server", "plain", "service kubernetes", "connect", address, 443, True, family)


def _by_name(places: Places, family: int) -> Iterator[Probe]:
    """Names are looked up as programs do it, by the pod's resolver and its search list."""
    address = places.services.get("far", {}).get(family)
    if not places.names or not address:
        return
    for name in ("far", f"far.{places.namespace}", f"far.{places.namespace}.svc"):
        yield Probe("name of a service", "plain", name, "dns", name, 0, True, family, (address,))
    behind = tuple(places.pods[s][family] for s in PAIR if family in places.pods.get(s, {}))
    headless = f"{HEADLESS}.{places.namespace}.svc"
    yield Probe("name of a headless service", "plain", headless, "dns", headless, 0, True, family, behind)
    yield Probe("service, by its name", "plain", "far", "http", f"far.{places.namespace}.svc", SERVICE_PORT, True,
                family, ("far",))  # fmt: skip


def _from_and_to_nodes(places: Places, family: int) -> Iterator[Probe]:
    for server, check in (("host-near", "pod to its own node"), ("host-far", "pod to another node")):
        address = places.pods.get(server, {}).get(family)
        if address:
            target = server.replace("-", " ")
            yield Probe(check, "plain", target, "http", address, places.host_port, True, family, (server,))
    yield from _pod(places, family, "node to its own pod", "host", "near")
    yield from _pod(places, family, "node to another node's pod", "host", "far")
    address = places.pods.get("host-far", {}).get(family)
    if address and places.mapped_port and family in places.pods.get("porter", {}):
        for client in ("plain", "host"):
            what = "pod porter", "http", address, places.mapped_port, True, family, ("porter",)
            yield Probe("host port of another node", client, *what)


def _policies(places: Places, family: int) -> Iterator[Probe]:
    yield from _pod(places, family, "allow by label: labelled pod", "friend", "guarded")
    yield from _pod(places, family, "allow by label: other pod", "plain", "guarded", allowed=False)
    yield from _pod(places, family, "allow by label: other port", "friend", "guarded", proto="tcp", allowed=False)
    yield from _service(places, family, "allow by label: by service", "friend", "guarded")
    yield from _service(places, family, "allow by label: other, by service", "plain", "guarded", allowed=False)
    yield from _pod(places, family, "default deny", "friend", "closed", allowed=False)
    yield from _pod(places, family, "egress block: inside", "walled", "far")
    yield from _pod(places, family, "egress block: exception", "walled", "fenced", allowed=False)
    yield from _pod(places, family, "egress deny: same node", "caged", "near", allowed=False)
    yield from _pod(places, family, "egress deny: other node", "caged", "far", allowed=False)


def _cilium_policies(places: Places, family: int) -> Iterator[Probe]:
    if not places.cilium:
        return
    yield from _pod(places, family, "CiliumNetworkPolicy: allowed", "friend", "barred")
    yield from _pod(places, family, "CiliumNetworkPolicy: other port", "friend", "barred", proto="tcp", allowed=False)
    yield from _pod(places, family, "CiliumNetworkPolicy: denied", "walled", "barred", allowed=False)
    yield from _pod(places, family, "CiliumNetworkPolicy: others", "plain", "barred", allowed=False)


def one_node(found: list[Probe]) -> list[Probe]:
    """What makes sense if there is one node only: nothing that is about another one."""
    return [p for p in found if "other node" not in p.check and "another node" not in p.check]
