"""lib/service.h as a function: asks service_select.bpf.c, and writes rows by hand."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any, Final

from datapath import DEFAULTS, FRONTEND_FLAG, LAYOUT, Setting, addr, prefix, show

from fimbria.kernel.bpf import BpfObject, MapFlag, MapType, create_map, prog_test_run
from fimbria.kernel.codec import Codec
from fimbria.model import rows

SOURCE: Final = Path(__file__).with_name("service_select.bpf.c")
TCP, UDP = 6, 17
TABLE_SIZE: Final = 16381
INSIDE, SOCKET = 1, 2
ASK, NOBODY, THIS_NODE, OTHER_NODE, POD_ADDRESS = range(5)
_QUERY: Final = struct.Struct("=16s16s2s2sBBBBIII16s16s2sH")  # struct service_query
_CODEC: Final[dict[type, Codec[Any]]] = {
    cls: Codec(LAYOUT, name, cls)
    for name, cls in (
        ("frontend_key", rows.FrontendKey), ("frontend", rows.Frontend), ("slot_key", rows.SlotKey),
        ("backend", rows.Backend), ("member_key", rows.MemberKey), ("affinity_key", rows.AffinityKey),
        ("affinity", rows.Affinity), ("source_key", rows.SourceKey), ("exempt_key", rows.ExemptKey),
        ("prefix_key", rows.PrefixKey), ("remote", rows.Remote),
    )
}  # fmt: skip


class Result(IntEnum):
    """enum service_result, and what service_admits() refuses."""

    NONE = 0
    FOUND = 1
    REFUSE = 2
    SILENT = 3
    DENIED = 4


@dataclass(frozen=True)
class Answer:
    result: Result
    backend: int
    slot: int
    service: int
    to: tuple[str, int]


class Selection:
    """The maps and the two programs."""

    def __init__(self, obj: BpfObject, **config: Setting) -> None:
        wanted = {**DEFAULTS, **config}
        obj.set_constants({name: wanted[name] for name in obj.constants})
        obj.load()
        self.maps = {name: obj.map(name) for name, spec in obj.maps.items() if not spec.internal}
        self.programs = {name: obj.program(name) for name in obj.programs}

    def put(self, name: str, key: object, row: object = 1) -> None:
        self.maps[name].update(_raw(key), _raw(row))

    def delete(self, name: str, key: object) -> None:
        assert self.maps[name].delete(_raw(key))

    def clear(self) -> None:
        for m in self.maps.values():
            keys, _ = m.dump()
            m.delete_batch(keys, len(keys) // m.key_size)

    def service(self, number: int, at: tuple[str, int], backends: dict[int, tuple[str, int]] | None = None,
                flags: str = "", proto: int = TCP, scope: int = 0, affinity: int = 0) -> None:  # fmt: skip
        """`backends`: address and port by id, in slot order; `flags`: names of enum frontend_flag."""
        backends = backends or {}
        for slot, (backend, (address, port)) in enumerate(backends.items()):
            self.put("backends", backend, rows.Backend(addr(address), port, proto))
            self.put("service_slots", rows.SlotKey(number, slot), backend)
            if affinity:
                self.put("service_members", rows.MemberKey(number, backend))
        bits = sum(FRONTEND_FLAG[name] for name in flags.split())
        key = rows.FrontendKey(addr(at[0]), at[1], proto, scope)
        self.put("frontends", key, rows.Frontend(number, len(backends), bits, affinity))

    def table(self, number: int, backends: Iterable[int]) -> None:
        """The service's table: the backends again and again."""
        of = list(backends)
        with create_map(MapType.ARRAY, 4, 4, TABLE_SIZE, MapFlag.MMAPABLE, "service_table") as inner:
            values = struct.pack(f"={TABLE_SIZE}I", *(of[i % len(of)] for i in range(TABLE_SIZE)))
            inner.update_batch(struct.pack(f"={TABLE_SIZE}I", *range(TABLE_SIZE)), values, TABLE_SIZE)
            self.maps["service_tables"].update(_raw(number), struct.pack("=i", inner.fd))

    def ask(self, at: tuple[str, int], client: str | bytes = "203.0.113.9", *, client_port: int = 40000,
            proto: int = TCP, flags: int = 0, owner: int = NOBODY, endpoint: int = 0,
            kept: tuple[int, int] | None = None) -> Answer:  # fmt: skip
        """`client`: an address, or a cookie as it lies in memory. `kept`: (backend, slot) to look up again."""
        who = addr(client) if isinstance(client, str) else client
        packet = _QUERY.pack(
            who, addr(at[0]), client_port.to_bytes(2, "big"), at[1].to_bytes(2, "big"), proto, flags, owner, 0,
            endpoint, *(kept or (0, 0)), bytes(16), bytes(16), bytes(2), 0,
        )  # fmt: skip
        run = prog_test_run(self.programs["kept_test" if kept else "select_test"].fd, packet)
        _, _, _, _, _, _, _, _, _, backend, slot, frontend, to, port, _ = _QUERY.unpack(run.data_out)
        service = int.from_bytes(frontend[:4], "little")
        return Answer(Result(run.retval), backend, slot, service, (show(to), int.from_bytes(port, "big")))


def node_address(s: Selection, address: str, own: bool) -> None:
    s.put("ipcache", prefix(address + ("/128" if ":" in address else "/32")), rows.Remote(1 if own else 6, 2))


def _raw(value: object) -> bytes:
    if isinstance(value, int):
        return struct.pack("=I", value)
    return _CODEC[type(value)].encode(value)
