"""What is read back from learned maps at start."""

from fimbria.agent.datapath import Layouts, backends_in_use
from fimbria.kernel.bpf import MapType, create_map
from fimbria.model.rows import CtEntry, CtKey

CONNECTION, SERVICE = 0, 1


def test_backends_that_connections_name() -> None:
    layouts = Layouts()
    keys, entries = layouts["ct_key"], layouts["ct_entry"]
    with create_map(MapType.LRU_HASH, keys.size, entries.size, 1024, 0, "conntrack") as conntrack:
        assert backends_in_use(conntrack, layouts) == set()
        for n in range(200):
            scope = SERVICE if n % 2 else CONNECTION
            key = CtKey(n.to_bytes(16, "big"), bytes(16), n, 80, 6, scope)
            row = CtEntry(1, 1, 1, 0, 1, 1, service=7, backend=1000 + n // 4, flags=0, tcp_flags=0, frontend_port=80,
                          frontend=bytes(16))  # fmt: skip
            conntrack.update(keys.encode(key), entries.encode(row))
        assert backends_in_use(conntrack, layouts) == {1000 + n // 4 for n in range(1, 200, 2)}
