"""Compares the kernel's two kinds of LRU table, as tables of connections: `python tests/bpf/lru_cost.py`.

    common   one list for all CPUs, the kernel's default
    apart    BPF_F_NO_COMMON_LRU: every CPU has a list and an equal share of the entries

Three questions: what does a new connection cost (alone, and while the other CPU makes some too; with room, and when
the table is full), how many connections fit if one CPU gets them all, and how many of those in use does a flood of new
ones push out? Programs run by test runs, one thread pinned to each of two CPUs.
"""

import os
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from compiling import compile_object

from fimbria.kernel._libbpf import ffi, lib
from fimbria.kernel.maps import Map
from fimbria.kernel.objects import BpfObject, Program

HERE = Path(__file__).parent
ENTRIES = 65536
RUNS = 200_000


def compiled() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return compile_object(HERE / "lru_cost.bpf.c", Path(folder)).read_bytes()


def run(program: Program, times: int) -> float:
    """Nanoseconds a run, as the kernel measures it."""
    packet = ffi.new("char[]", 64)
    raw = ffi.new("struct fim_test_run *", {"data_in": packet, "data_in_len": 64, "repeat": times})
    assert lib.fim_prog_test_run(program.fd, raw) == 0
    return float(raw.duration_ns)


def on_cpu(cpu: int, work: Callable[[], None]) -> threading.Thread:
    def body() -> None:
        os.sched_setaffinity(0, {cpu})
        work()

    thread = threading.Thread(target=body)
    thread.start()
    return thread


def clear(table: Map) -> None:
    keys, _ = table.dump()
    table.delete_batch(keys, len(keys) // table.key_size)


def cost(program: Program, table: Map, cpus: tuple[int, ...], full: bool) -> float:
    """Of a new connection, the mean of the CPUs."""
    clear(table)
    runs = ENTRIES // 8
    if full:
        for thread in [on_cpu(c, lambda: run(program, 2 * ENTRIES) and None) for c in (0, 1)]:
            thread.join()
        runs = RUNS
    found: list[float] = []
    for thread in [on_cpu(c, lambda: found.append(run(program, runs))) for c in cpus]:
        thread.join()
    return sum(found) / len(found)


def fits(program: Program, table: Map) -> int:
    """Connections that one CPU can have."""
    clear(table)
    on_cpu(0, lambda: run(program, 4 * ENTRIES) and None).join()
    return len(table.dump()[0]) // table.key_size


def lost(insert: Program, touch: Program, table: Map, hot: int, flood_cpu: int) -> float:
    """Share of connections in use (on CPU 1, each touched over and over) that a flood of new ones pushes out.

    For every hundred packets of connections in use, hundred new connections.
    """
    clear(table)
    on_cpu(1, lambda: run(touch, hot) and None).join()
    before = hot_keys(table)
    gone: list[int] = []
    for _ in range(20):
        on_cpu(1, lambda: run(touch, hot) and None).join()
        on_cpu(flood_cpu, lambda: run(insert, hot) and None).join()
        gone.append(len(before - hot_keys(table)))
    return sum(gone) / len(gone) / max(len(before), 1)


def hot_keys(table: Map) -> set[bytes]:
    keys, _ = table.dump()
    size = table.key_size
    cut = (keys[i : i + size] for i in range(0, len(keys), size))
    return {k for k in cut if int.from_bytes(k[:8], "little") >= 1000}


def main() -> None:
    source = compiled()
    print(f"{ENTRIES} entries; median of 5")
    for name in ("common", "apart"):
        for hot_share in (0.25, 0.4):
            hot = int(ENTRIES * hot_share)
            with BpfObject(source, "lru_cost") as obj:
                obj.set_constants({"cfg_hot": hot})
                obj.load()
                insert, touch, table = obj.program(f"insert_{name}"), obj.program(f"touch_{name}"), obj.map(name)
                if hot_share == 0.25:
                    for full in (False, True):
                        for cpus in ((0,), (0, 1)):
                            figures = sorted(cost(insert, table, cpus, full) for _ in range(5))
                            state = "full" if full else "with room"
                            print(f"{name:7} new connection, {len(cpus)} CPUs, {state:9}: {figures[2]:6.0f} ns")
                    print(f"{name:7} one CPU has room for {fits(insert, table)}")
                for cpu in (1, 0):
                    began = time.monotonic()
                    share = lost(insert, touch, table, hot, cpu)
                    where = "same CPU" if cpu else "other CPU"
                    print(f"{name:7} {hot} in use, flood on the {where:9}: {share:6.1%} lost "
                          f"({time.monotonic() - began:.1f} s)")  # fmt: skip


if __name__ == "__main__":
    main()
