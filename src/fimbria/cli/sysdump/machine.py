"""What a node's kernel says of itself: files of /proc and /sys, devices, routes, BPF programs and links. Read-only."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

MOST_ROWS: Final = 5000
# file -> what it is called in the archive
FILES: Final = {
    "/proc/version": "version.txt", "/proc/cmdline": "cmdline.txt", "/proc/meminfo": "meminfo.txt",
    "/proc/loadavg": "loadavg.txt", "/proc/uptime": "uptime.txt", "/proc/mounts": "mounts.txt",
    "/proc/modules": "modules.txt", "/proc/interrupts": "interrupts.txt", "/proc/softirqs": "softirqs.txt",
    "/proc/pressure/cpu": "pressure-cpu.txt", "/proc/pressure/memory": "pressure-memory.txt",
    "/proc/net/dev": "net-dev.txt", "/proc/net/snmp": "net-snmp.txt", "/proc/net/snmp6": "net-snmp6.txt",
    "/proc/net/netstat": "net-netstat.txt", "/proc/net/sockstat": "net-sockstat.txt",
    "/proc/net/sockstat6": "net-sockstat6.txt", "/proc/net/softnet_stat": "net-softnet_stat.txt",
    "/proc/net/nf_conntrack_count": "net-nf_conntrack_count.txt", "/proc/net/protocols": "net-protocols.txt",
}  # fmt: skip
# Folders and files below /proc/sys that bear on forwarding; per-device ones are followed one folder down.
SYSCTLS: Final = (
    "kernel/unprivileged_bpf_disabled", "kernel/bpf_stats_enabled", "kernel/osrelease", "kernel/hostname",
    "net/core", "net/ipv4", "net/ipv6", "net/ipv4/conf/*", "net/ipv6/conf/*", "net/ipv4/neigh/default",
    "net/ipv6/neigh/default", "net/netfilter", "vm/max_map_count", "fs/file-nr",
)  # fmt: skip
_UNREADABLE: Final = ("stable_secret", "tcp_fastopen_key", "flush")
RTM_GETRULE: Final = 34
_FIB_RULE = struct.Struct("=BBBBBBBBI")  # struct fib_rule_hdr: family, lengths, tos, table, 2 reserved, action, flags


def read(path: str | Path, most: int = 1 << 20) -> str:
    """The beginning of a file. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(most).decode(errors="replace")


def sysctls(root: Path = Path("/proc/sys")) -> Iterator[str]:
    """`net.ipv4.ip_forward = 1` lines; what can't be read is left out."""
    for pattern in SYSCTLS:
        for found in sorted(root.glob(pattern)):
            for path in sorted(found.iterdir()) if found.is_dir() else (found,):
                if path.is_file() and path.name not in _UNREADABLE:
                    try:
                        text = read(path, 4096).strip().replace("\n", " | ")
                    except OSError:
                        continue
                    yield f"{'.'.join(path.relative_to(root).parts)} = {text}\n"


def network() -> dict[str, Callable[[], Any]]:
    """Tables of this network namespace, each by a function that raises OSError."""
    return {
        "links": _links, "addresses": _addresses, "routes": _routes, "rules": _rules, "neighbours": _neighbours,
    }  # fmt: skip


def _links() -> Any:
    from fimbria.kernel import link
    from fimbria.kernel.netlink import NetlinkSocket

    with NetlinkSocket() as sock:
        return [_plain(asdict(d)) for d in link.dump(sock)[:MOST_ROWS]]


def _addresses() -> Any:
    from fimbria.kernel import link
    from fimbria.kernel.netlink import NetlinkSocket

    with NetlinkSocket() as sock:
        return [_plain(asdict(a)) for a in link.dump_addresses(sock)[:MOST_ROWS]]


def _routes() -> Any:
    from fimbria.kernel import route
    from fimbria.kernel.netlink import NetlinkSocket

    with NetlinkSocket() as sock:
        return {
            f"ipv{number}": [str(r) for r in route.dump(sock, family)[:MOST_ROWS]]
            for number, family in ((4, route.FAMILIES[4]), (6, route.FAMILIES[16]))
        }


def _neighbours() -> Any:
    from fimbria.kernel import neighbour, route
    from fimbria.kernel.netlink import NetlinkSocket

    with NetlinkSocket() as sock:
        found = [n for size in (4, 16) for n in neighbour.dump(sock, route.FAMILIES[size])]
        return [_plain(asdict(n)) for n in found[:MOST_ROWS]]


def _rules() -> Any:
    """Policy routing (include/uapi/linux/fib_rules.h): who is asked which table, in order."""
    from fimbria.kernel.netlink import NetlinkSocket, Request, attrs, number
    from fimbria.kernel.route import FAMILIES, show

    found = []
    with NetlinkSocket() as sock:
        for family in FAMILIES.values():
            request = Request(RTM_GETRULE, 0, _FIB_RULE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0), "list rules")
            for m in sock.dump(request):
                header = _FIB_RULE.unpack_from(m.data, m.start)
                a = attrs(m.data, m.start + _FIB_RULE.size, m.end)
                found.append(
                    {
                        "family": header[0],
                        "priority": number(a.get(6)),
                        "from": f"{show(a[2])}/{header[2]}" if 2 in a else "all",
                        "to": f"{show(a[1])}/{header[1]}" if 1 in a else "all",
                        "iif": a[3].rstrip(b"\0").decode(errors="replace") if 3 in a else "",
                        "fwmark": f"{number(a.get(10)):#x}/{number(a.get(16)):#x}" if 10 in a else "",
                        "table": number(a.get(15)) or header[4],
                        "action": header[7],
                    }
                )
    return found


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    from fimbria.kernel.route import show

    shown: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, bytes):
            shown[name] = show(value) if len(value) in (4, 16) else value.hex(":")
        else:
            shown[name] = _plain(value) if isinstance(value, dict) else value
    return shown


def bpf() -> dict[str, Callable[[], Any]]:
    """Programs, maps and links of the machine, and what the kernel can do; each raises OSError."""
    return {"programs": _programs, "maps": _maps, "links": _bpf_links, "features": _features}


def _programs() -> Any:
    from fimbria.kernel.links import prog_info, program_by_id, program_ids

    def one(number: int) -> Any:
        with program_by_id(number) as program:
            return asdict(prog_info(program.fd))

    return _each(program_ids(), one)


def _maps() -> Any:
    from fimbria.kernel.links import map_ids
    from fimbria.kernel.maps import Map

    def one(number: int) -> Any:
        with Map.by_id(number) as found:
            return asdict(found.info)

    return _each(map_ids(), one)


def _bpf_links() -> Any:
    from fimbria.kernel.links import Link, link_ids

    def one(number: int) -> Any:
        with Link.by_id(number) as found:
            return asdict(found.info())

    return _each(link_ids(), one)


def _each(numbers: Iterator[int], one: Callable[[int], Any]) -> list[Any]:
    found = []
    for number in numbers:
        try:
            found.append(one(number))
        except OSError as error:
            found.append({"id": number, "error": str(error)})
        if len(found) >= MOST_ROWS:
            break
    return found


def _features() -> Any:
    from fimbria.kernel import probe

    return {
        "kernel": os.uname().release,
        "machine": os.uname().machine,
        "cpus": os.cpu_count(),
        "btf": probe.has_btf(),
        "tcx": probe.has_tcx(),
        "cgroup2": probe.cgroup2_mount(),
        "capabilities": f"{probe.capabilities():#x}",
        "problems": probe.problems(),
    }
