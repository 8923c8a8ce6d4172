"""Real clients reach Services through a node whose device runs XDP: beside tc, and with no program but XDP."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from compiling import compile_object
from datapath import DEFAULTS, OBJECTS, Setting, addr
from test_nodeport_traffic import (
    BACKEND_PORT,
    FRONT,
    FRONT_PORT,
    NODE_PORT,
    NODE_PORT_FLAG,
    Server,
    forget_connections,
    serve,
)
from test_xdp import DIRECT_RETURN

from fimbria.kernel.bpf import BpfObject, Program, attach_xdp
from fimbria.kernel.probe import has_tcx
from lab import UDP, Lab, Mode, Node, Space, lab, run, tcp_service

HERE = Path(__file__).parent
CLIENT = {4: "192.168.1.1", 6: "fd01:1::1"}  # the router, as node 1 sees it
DRIVER, GENERIC = 4, 2  # XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE
DIRECT = NODE_PORT_FLAG | DIRECT_RETURN


def load_xdp(node: Node, flags: int) -> Program:
    """The XDP object with the node's maps and addresses."""
    mine: dict[str, Setting] = {
        "cfg_node_addr4": addr(node.addr[4]),
        "cfg_node_addr6": addr(node.addr[6]),
        "cfg_router_addr4": addr(node.router[4]),
        "cfg_router_addr6": addr(node.router[6]),
        "cfg_overlay_ifindex": node.space.ifindex("fimvx") if node.mode.overlay else 0,
    }
    with BpfObject(OBJECTS / "xdp.bpf.o") as obj:
        obj.set_constants({n: {**DEFAULTS, **mine}[n] for n in obj.constants})
        shared = {n: node.dp.maps[n] for n, spec in obj.maps.items() if not spec.internal}
        obj.resize({n: m.info.max_entries for n, m in shared.items()})
        obj.reuse(shared)
        obj.load()
        return obj.program("from_device" if flags == DRIVER else "from_device_skb")


MODES = {"native": (False, DRIVER), "generic": (False, GENERIC), "overlay": (True, DRIVER)}


@pytest.fixture(scope="module", params=MODES)
def net(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    overlay, flags = MODES[request.param]
    compiled = compile_object(HERE / "xdp_pass.bpf.c", tmp_path_factory.mktemp("bpf"))
    with contextlib.ExitStack() as stack:
        built = stack.enter_context(lab(Mode(overlay=overlay, tcx=has_tcx())))
        node, fabric = built.nodes[0], built.fabric
        for family, address in FRONT.items():
            fabric.ip(f"route add {address} via {node.addr[family]}")
        for name in ("all", "n1", "n2"):
            # The client is the router: what is sent on in its name comes back to it.
            fabric.sysctl(**{f"ipv4__conf__{name}__rp_filter": 0, f"ipv4__conf__{name}__accept_local": 1})
        # What a real network card does: sums are right in what arrives.
        fabric.checksum_offload("n1", False)
        # Whoever has no tc program to ask has to know his neighbour.
        mac = ":".join(f"{b:02x}" for b in fabric.mac("n1"))
        for gateway in CLIENT.values():
            node.space.ip(f"neigh replace {gateway} lladdr {mac} dev eth0 nud permanent")
        attach(stack, node.space, "eth0", load_xdp(node, flags), flags)
        with BpfObject(compiled) as far:
            far.load()
            attach(stack, fabric, "n1", far.program("pass"), DRIVER)
        yield built


@pytest.fixture(autouse=True)
def _no_former_connections(net: Lab) -> Iterator[None]:
    yield
    forget_connections(net.nodes)


def attach(stack: contextlib.ExitStack, space: Space, device: str, program: Program, flags: int) -> None:
    stack.enter_context(program)
    stack.enter_context(space.inside(lambda: attach_xdp(program, space.ifindex(device), flags)))


def server(net: Lab, name: str, family: int, caller: str) -> Server:
    if name == "c":
        pod = net.pod("c")
        return Server(pod.space, pod.addr[family], caller)
    return Server(net.nodes[1].space, net.nodes[1].addr[family], caller)


def exchange(s: Server, client: Space, family: int, front: tuple[str, int]) -> str:
    """Datagrams that need no fragments; returns the client's address as the server saw it."""
    with s.space.socket(family, UDP) as listener, client.socket(family, UDP) as c:
        listener.bind((s.addr, BACKEND_PORT))
        c.connect(front)
        for size in (0, 1, 10, 1001, 1378):
            c.send(b"q" * size)
            data, peer = listener.recvfrom(65536)
            assert len(data) == size
            listener.sendto(b"r" * size, peer)
            assert c.recv(65536) == b"r" * size
        return str(peer[0])


def caller(net: Lab, name: str, family: int) -> str:
    """Who calls a backend of node 2 for a client."""
    first = net.nodes[0]
    return (first.router if name == "c" and net.mode.overlay else first.addr)[family]


def both_fronts(net: Lab, s: Server, family: int) -> None:
    for front in ((net.nodes[0].addr[family], NODE_PORT), (FRONT[family], FRONT_PORT)):
        assert tcp_service(s.space, net.fabric, family, (s.addr, BACKEND_PORT), front) == s.caller
        assert exchange(s, net.fabric, family, front) == s.caller


@pytest.fixture
def alone(net: Lab) -> Iterator[None]:
    """Nothing of tc at node 1's devices."""
    node = net.nodes[0]
    hooks = [("network", "eth0")] if not net.mode.overlay else [("overlay", "fimvx"), ("network", "eth0")]
    for link in [node.links.pop(0) for _ in range(2 * len(hooks) if net.mode.tcx else 0)]:
        link.close()
    for _, device in () if net.mode.tcx else hooks:
        run("tc", "-n", node.space.name, "qdisc", "del", "dev", device, "clsact")
    pods, node.links = node.links, []
    yield
    for name, device in hooks:
        node.attach(f"from_{name}", device, False)
        node.attach(f"to_{name}", device, True)
    node.links += pods


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", ["c", "other"])
def test_beside_tc(net: Lab, name: str, family: int) -> None:
    s = server(net, name, family, caller(net, name, family))
    serve(net.nodes[0], family, s.addr)
    both_fronts(net, s, family)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", ["a", "node"])
def test_what_is_for_this_node_still_arrives(net: Lab, name: str, family: int) -> None:
    node = net.nodes[0]
    place = (node.space, node.addr) if name == "node" else (net.pod("a").space, net.pod("a").addr)
    s = Server(place[0], place[1][family], CLIENT[family])
    serve(node, family, s.addr)
    both_fronts(net, s, family)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", ["c", "other"])
def test_what_a_device_should_sum_up_is_left_to_tc(net: Lab, name: str, family: int) -> None:
    s = server(net, name, family, caller(net, name, family))
    serve(net.nodes[0], family, s.addr)
    net.fabric.checksum_offload("n1", True)
    try:
        both_fronts(net, s, family)
    finally:
        net.fabric.checksum_offload("n1", False)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", ["c", "other"])
def test_by_xdp_alone(net: Lab, name: str, family: int) -> None:
    s = server(net, name, family, caller(net, name, family))
    serve(net.nodes[0], family, s.addr)
    both_fronts(net, s, family)


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("family", [4, 6])
def test_direct_return_by_xdp_alone(net: Lab, family: int) -> None:
    s = server(net, "c", family, CLIENT[family])
    for node in net.nodes:
        serve(node, family, s.addr, flags=DIRECT)
    both_fronts(net, s, family)
