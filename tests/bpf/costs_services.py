"""The ways of Services through the programs whose cost `cost.py` measures, and what a socket's `connect` costs."""

import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path as File

from costs import Path
from datapath import DEFAULTS, Datapath, addr
from record import Wire, syn
from sockets import BACKENDS, FRONTEND, OBJECT, UDP, Net, Services, network, sub_cgroup
from test_nodeport import BOUND, CALL, CLIENT, DIRECT, NODE_PORT, TCP_PORT, call, from_a, nodeport
from test_nodeport_remote import ARRIVED, answer
from test_xdp import came

from fimbria.apply.attach import SOCKET_HOOKS
from fimbria.kernel import netns
from fimbria.kernel.bpf import BpfObject, MapFlag, MapType, attach_cgroup, create_map, prog_info
from fimbria.model import rows

AFFINITY, TABLE, HASH = 4, 128, 256
TABLE_SIZE = int(DEFAULTS["cfg_table_size"])
CONNECTS = 5_000
STATISTICS = File("/proc/sys/kernel/bpf_stats_enabled")


def affine(dp: Datapath, w: Wire) -> None:
    nodeport("a", flags=NODE_PORT | AFFINITY)(dp, w)
    every = addr("0.0.0.0" if w.family == 4 else "::")
    row = rows.Frontend(7, 1, NODE_PORT | AFFINITY, 3600)
    dp.put("frontends", rows.FrontendKey(every, TCP_PORT, 6), row)
    dp.put("service_members", struct.pack("=II", 7, 700), 1)


def tabled(dp: Datapath, w: Wire) -> None:
    nodeport("a", flags=NODE_PORT | TABLE | HASH)(dp, w)
    with create_map(MapType.ARRAY, 4, 4, TABLE_SIZE, MapFlag.MMAPABLE, "service_table") as inner:
        keys, values = struct.pack(f"={TABLE_SIZE}I", *range(TABLE_SIZE)), struct.pack("=I", 700) * TABLE_SIZE
        inner.update_batch(keys, values, TABLE_SIZE)
        dp.maps["service_tables"].update(struct.pack("=I", 7), struct.pack("=i", inner.fd))


ACK = call(payload=syn(CLIENT, TCP_PORT, "A"))
NEAR, FAR, DIRECTLY = nodeport("a"), nodeport("c"), nodeport("c", flags=NODE_PORT | DIRECT)
XDP_CALL = ("from_device", lambda w: came(w, "world", "node", syn(CLIENT, TCP_PORT)))
SERVICES: list[Path] = [
    Path("node port, backend here", "from_network", ACK, NEAR, (CALL,)),
    Path("node port, backend here, answer", "from_pod", from_a(syn(8080, CLIENT, "A")), NEAR, (CALL,)),
    Path("node port, backend behind the tunnel", "from_network", ACK, FAR, (CALL,)),
    Path("node port, backend elsewhere", "from_network", ACK, FAR, (CALL,), node="native"),
    Path("node port, backend elsewhere, answer", "from_network", answer(syn(8080, BOUND, "A")), FAR, (CALL,),
         node="native"),
    Path("direct return, the frontend put in", "from_network", CALL[1], DIRECTLY, (CALL,), node="native"),
    Path("direct return, the rest of a connection", "from_network", ACK, DIRECTLY, (CALL,), node="native"),
    Path("direct return, the frontend taken out", "from_network", ARRIVED[1], NEAR, (ARRIVED,), node="native"),
    Path("new connection to a node port", "from_network", CALL[1], NEAR, fresh=True),
    Path("new connection to a node port, affinity", "from_network", CALL[1], affine, (CALL,), fresh=True),
    Path("new connection to a node port, Maglev", "from_network", CALL[1], tabled, fresh=True),
    Path("new connection to a node port, backend elsewhere", "from_network", CALL[1], FAR, node="native", fresh=True),
    Path("XDP, backend elsewhere", "from_device", lambda w: came(w, "world", "node", syn(CLIENT, TCP_PORT, "A")), FAR,
         (XDP_CALL,), node="native"),
    Path("XDP, backend elsewhere, answer", "from_device", lambda w: came(w, "c", "node", syn(8080, BOUND, "A")), FAR,
         (XDP_CALL,), node="native"),
    Path("XDP, direct return, the frontend put in", "from_device", XDP_CALL[1], DIRECTLY, (XDP_CALL,), node="native"),
    Path("XDP, what isn't for it", "from_device", lambda w: came(w, "world", "node", syn(CLIENT, 22, "A")), FAR,
         node="native"),
]  # fmt: skip


@contextmanager
def counted() -> Iterator[None]:
    """The kernel counts the time that programs take; it isn't free, and off again at the end."""
    before = STATISTICS.read_text()
    STATISTICS.write_text("1")
    try:
        yield
    finally:
        STATISTICS.write_text(before)


def connects(family: int, rounds: int = 9) -> dict[str, list[float]]:
    """Nanoseconds of one run of the connect hook, a figure a round: to a Service, and to an address that is none's."""
    name = f"connect{family}"
    with ExitStack() as stack:
        host, pod = stack.enter_context(network())
        cgroup = stack.enter_context(sub_cgroup())
        obj = stack.enter_context(BpfObject(OBJECT))
        wanted = {**DEFAULTS, "cfg_host_netns": netns.cookie(host)}
        obj.set_constants({name: wanted[name] for name in obj.constants})
        obj.load()
        hook = stack.enter_context(obj.program(f"sock_{name}"))
        stack.enter_context(attach_cgroup(hook, cgroup, SOCKET_HOOKS[name]))
        maps = {n: stack.enter_context(obj.map(n)) for n, spec in obj.maps.items() if not spec.internal}
        services, net = Services(maps), Net(host, pod)
        stack.callback(net.close)
        stack.enter_context(counted())
        services.frontend((FRONTEND[family], 53), UDP, 1, {n: (b, 53) for n, b in enumerate(BACKENDS[family])})
        targets = {"connect to a Service by socket": (FRONTEND[family], 53),
                   "connect by socket, no Service": (BACKENDS[family][0], 53)}  # fmt: skip
        found: dict[str, list[float]] = {n: [] for n in targets}
        sock = net.open(family, UDP)
        for _ in range(rounds):
            for path, target in targets.items():
                before = prog_info(hook.fd)
                for _ in range(CONNECTS):
                    sock.connect(target)
                after = prog_info(hook.fd)
                runs = after.run_count - before.run_count
                assert runs == CONNECTS, "somebody else's connections are counted"
                found[path].append((after.run_time_ns - before.run_time_ns) / runs)
        return found
