"""Loads every object under every setting and every pair of settings.

Prints a line per combination with the verified instruction count, and exits 0 when the kernel took all of them: a
setting that is off hides from the verifier what it would refuse. `--json` prints one list instead.
"""

import argparse
import json
import platform
import sys
from collections.abc import Iterator
from itertools import combinations

from datapath import DEFAULTS, OBJECTS, SIZES, addr

from fimbria.kernel.bpf import BpfError, BpfObject, prog_info

# Settings that aren't plain switches: the value that differs from the default.
OTHER: dict[str, int | bool | bytes] = {
    "cfg_overlay_ifindex": 3,
    "cfg_host_netns": 7,
    "cfg_trace_interval_ns": 0,
    "cfg_node_addr4": addr("192.0.2.1"),
    "cfg_node_addr6": addr("2001:db8::1"),
    "cfg_router_addr4": addr("10.0.0.1"),
    "cfg_router_addr6": addr("fd00::1"),
    "cfg_nat_port_min": 65535,
    "cfg_table_size": 251,
    "cfg_service_seed": 0x12345678,
}


def settings_of(name: str) -> list[dict[str, int | bool | bytes]]:
    """What to change from the defaults: nothing, each setting, each pair."""
    with BpfObject(OBJECTS / f"{name}.bpf.o") as obj:
        names = sorted(obj.constants)
    changes = {n: OTHER.get(n, not DEFAULTS[n]) for n in names if n in OTHER or isinstance(DEFAULTS[n], bool)}
    chosen = [c for size in range(3) for c in combinations(changes, size)]
    return [{n: changes[n] for n in c} for c in chosen]


def load(name: str, changed: dict[str, int | bool | bytes]) -> dict[str, int]:
    """The verified instructions of each program. Raises BpfError."""
    with BpfObject(OBJECTS / f"{name}.bpf.o") as obj:
        obj.set_constants({k: v for k, v in {**DEFAULTS, **changed}.items() if k in obj.constants})
        obj.resize({n: s for n, s in SIZES.items() if n in obj.maps})
        obj.load()
        counts = {}
        for program in obj.programs:
            with obj.program(program) as loaded:
                counts[program] = prog_info(loaded.fd).verified_insns
        return counts


def results(names: list[str]) -> Iterator[dict[str, object]]:
    for name in names:
        for changed in settings_of(name):
            row: dict[str, object] = {"object": name, "changed": sorted(changed)}
            try:
                yield {**row, "verified": load(name, changed)}
            except BpfError as e:
                yield {**row, "error": str(e)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("objects", nargs="*", default=["pod", "overlay", "host", "socket"])
    options = parser.parse_args()
    rows = []
    for row in results(options.objects):
        rows.append(row)
        if not options.json:
            label = " ".join(row["changed"]) or "defaults"  # type: ignore[arg-type]
            print(f"{row['object']:8} {label:60} {row.get('verified') or row['error']}", flush=True)
    failed = sum("error" in row for row in rows)
    if options.json:
        print(json.dumps({"kernel": platform.release(), "combinations": rows}, indent=1))
    else:
        print(f"{len(rows)} combinations on {platform.release()}, {failed} refused")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
