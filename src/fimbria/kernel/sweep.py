"""Walks over maps that programs fill: some entries at a time, judged and removed without a Python loop per entry.

What may expire carries a stamp, 8 bytes in host order at a fixed offset of the value: nanoseconds of CLOCK_MONOTONIC.
An entry is removed by taking it out of the map and looking at what came out: if a program renewed it between look-up
and removal, it is put back at once (and one that a program has made anew meanwhile stays).
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fimbria.kernel._libbpf import ffi, lib
from fimbria.kernel.btf import Btf, Kind
from fimbria.kernel.maps import Map, MapError

_CURSOR: Final = 4


def offsets(btf: Btf, name: str) -> dict[str, int]:
    """Where each member of a struct begins, in bytes, and under `""` the struct's size. Raises BtfError."""
    found = btf.find(Kind.STRUCT, name)
    return {m.name: m.bit_offset // 8 for m in found.members if m.name} | {"": found.size}


class Sweep:
    """A walk over one hash map, a batch of entries at a time, from the first to the last and then again.

    Entries that stay are met exactly once a walk; of those that come or go meanwhile some may be missed until the next.
    Not safe to use from several threads at once. All errors are MapError.
    """

    def __init__(self, bpf_map: Map, batch: int = 2048) -> None:
        """`batch` is how many entries a step looks at; more if one bucket of the map holds more."""
        self.map = bpf_map
        self.count = 0
        self._cursors = (ffi.new("char[]", _CURSOR), ffi.new("char[]", _CURSOR))
        self._going = False
        self._value = ffi.new("char[]", bpf_map.value_size)
        self._reserve(min(batch, max(bpf_map.max_entries, 64)))

    def _reserve(self, batch: int) -> None:
        ks, vs = self.map.key_size, self.map.value_size
        self._batch = batch
        self._keep = (ffi.new("char[]", batch * ks), ffi.new("char[]", batch * vs), ffi.new("uint64_t[]", batch))
        self.rows = ffi.new("struct fim_rows *")
        self.rows.keys, self.rows.values, self.rows.before = self._keep
        self.rows.key_size, self.rows.value_size = ks, vs

    def step(self) -> bool:
        """Reads the next entries: `count` of them. True when these were the walk's last."""
        into, out = self._cursors if self._going else (ffi.NULL, self._cursors[1])
        self._cursors = (self._cursors[1], self._cursors[0])
        counter = ffi.new("uint32_t *", self._batch)
        result = lib.fim_walk(self.map.fd, into, out, self._keep[0], self._keep[1], counter)
        while result == -errno.ENOSPC and self._batch < 1 << 24:
            self._reserve(self._batch * 2)
            counter[0] = self._batch
            result = lib.fim_walk(self.map.fd, into, out, self._keep[0], self._keep[1], counter)
        if result < 0 and result != -errno.ENOENT:
            self._going = False
            raise MapError(-result, "walk", self.map.name)
        self._going = result == 0
        self.count = self.rows.count = counter[0]
        return not self._going

    def row(self, at: int) -> tuple[bytes, bytes]:
        """One of the rows at hand, `at` < rows.count."""
        ks, vs = self.map.key_size, self.map.value_size
        keys, values = ffi.buffer(self._keep[0]), ffi.buffer(self._keep[1])
        return keys[at * ks : at * ks + ks], values[at * vs : at * vs + vs]

    def keep_expired(self, stamp: int, before: int, groups: Groups | None = None) -> int:
        """Leaves the rows with a stamp less than `before`, or than their group's limit; returns how many."""
        self.rows.stamp = stamp
        held = (groups or Groups()).held(before)
        lib.fim_keep_expired(self.rows, held[0])
        return int(self.rows.count)

    def keep_living(self, stamp: int, now: int) -> int:
        """Leaves the rows with a stamp of `now` or later; returns how many."""
        self.rows.stamp = stamp
        lib.fim_keep_living(self.rows, now)
        return int(self.rows.count)

    def keep_numbers(self, offset: int, numbers: Sequence[int]) -> int:
        """Leaves the rows whose value has one of the sorted `numbers` at an offset (32 bits); returns how many."""
        lib.fim_keep_numbers(self.rows, offset, ffi.new("uint32_t[]", numbers), len(numbers))
        return int(self.rows.count)

    def keep_over(self, nat: NatRules, tally: Tally) -> int:
        """Of the map `nat`: leaves the rows whose connection is over; returns how many."""
        self.rows.stamp = nat.used
        if lib.fim_nat_keep_over(nat.raw, self.rows, tally.raw) < 0:
            raise MapError(errno.EINVAL, "judge", self.map.name)
        return int(self.rows.count)

    def add_to(self, other: Map) -> int:
        """Writes the rows that are left to a map of the same layout, but none that it has; returns how many."""
        added = lib.fim_add(other.fd, self.rows)
        if added < 0:
            raise MapError(-added, "add to", other.name)
        return int(added)

    def remove(self) -> tuple[int, int]:
        """Takes out the rows that are left, unless they were renewed: how many went, how many were."""
        renewed = ffi.new("uint32_t *")
        taken = lib.fim_take(self.map.fd, self.rows, self._value, renewed)
        if taken < 0:
            raise MapError(-taken, "remove from", self.map.name)
        return taken, int(renewed[0])


def count(bpf_map: Map) -> int:
    """The entries of a hash map, without reading all of them into memory at once. Blocks. Raises MapError."""
    sweep, total, last = Sweep(bpf_map), 0, False
    while not last:
        last = sweep.step()
        total += sweep.count
    return total


def copy_missing(old: Map, new: Map, stamp: int | None = None) -> int:
    """Copies what a hash map lacks from another one of the same layout, whoever writes to both meanwhile; returns how
    many rows. Those whose `stamp`, if they have one, is over stay behind: they would push living ones out of a smaller
    map. Blocks: 100,000 rows are 0.1 s. Raises MapError."""
    sweep, copied, last = Sweep(old), 0, False
    while not last:
        last = sweep.step()
        if stamp is not None:
            sweep.keep_living(stamp, time.clock_gettime_ns(time.CLOCK_MONOTONIC))
        copied += sweep.add_to(new)
    return copied


@dataclass(frozen=True, slots=True)
class Groups:
    """Limits by a 32-bit number in the key; what has another number takes the general one."""

    offset: int = 0
    limits: Mapping[int, int] | None = None

    def held(self, other: int) -> tuple[Any, ...]:
        """The C value, and what must live as long as it."""
        numbers = sorted(self.limits or ())
        raw = ffi.new("struct fim_groups *")
        held = ffi.new("uint32_t[]", numbers), ffi.new("uint64_t[]", [(self.limits or {})[n] for n in numbers])
        raw.offset, raw.count, raw.other = self.offset, len(numbers), max(other, 0)
        raw.numbers, raw.before = held
        return raw, held


class NatRules:
    """How rows of `nat` and of `conntrack` belong together, by the layouts of their structs."""

    def __init__(self, btf: Btf, conntrack: Map) -> None:
        """Raises BtfError, KeyError for a struct without a member that is needed."""
        key, entry = offsets(btf, "nat_key"), offsets(btf, "nat_entry")
        owner, connection = offsets(btf, "ct_key"), offsets(btf, "ct_entry")
        self.used = entry["used"]
        raw = self.raw = ffi.new("struct fim_nat *")
        raw.ct_fd = conntrack.fd
        for name in ("saddr", "daddr", "sport", "dport", "proto", "direction"):
            setattr(raw, name, key[name])
        for name in ("addr", "port", "flags", "frontend", "frontend_port"):
            setattr(raw, name, entry[name])
        for name in ("local", "remote", "local_port", "remote_port", "scope"):
            setattr(raw, name, owner[name])
        raw.ct_proto, raw.expires = owner["proto"], connection["expires"]
        raw.ct_key_size, raw.ct_value_size = owner[""], connection[""]
        values = dict(btf.named("enum nat_flag").values) | dict(btf.named("enum ct_scope").values)
        raw.of_service, raw.scope_service = values["NAT_SERVICE"], values["CT_SCOPE_SERVICE"]
        raw.direction_in = dict(btf.named("enum direction").values)["DIRECTION_INGRESS"]

    def at(self, now: int, recent: int, lonely: int) -> None:
        """Nanoseconds: a row unused for `recent` is looked at, and over after `lonely` if no connection is known."""
        self.raw.now, self.raw.recent, self.raw.lonely = now, max(now - recent, 0), max(now - lonely, 0)


class Tally:
    """Source ports in use by destination, counted during one walk over `nat`."""

    def __init__(self) -> None:
        self.raw = ffi.new("struct fim_tally *")

    def clear(self) -> None:
        """Begin to count."""
        ffi.memmove(self.raw, bytes(ffi.sizeof("struct fim_tally")), ffi.sizeof("struct fim_tally"))

    @property
    def most(self) -> int:
        """Ports in use towards the destination that has most."""
        return int(self.raw.most)

    @property
    def rows(self) -> int:
        """Ports in use in all, towards every destination."""
        return int(self.raw.rows)

    def fullest(self, key_size: int) -> bytes:
        """A key of `nat` (ingress) towards the destination that has most."""
        return bytes(ffi.buffer(self.raw.key, key_size))
