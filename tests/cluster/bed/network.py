"""The cluster's network: one bridge in the namespace `control`, a cable to each node and to the world outside."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.cluster.bed.errors import BedError
from tests.cluster.bed.layout import NETNS, Layout, addresses
from tests.cluster.bed.processes import run

from fimbria.lab import kernel

BRIDGE = "br0"
_QUIET6 = {f"net/ipv6/conf/{scope}/{key}": "0" for scope in ("all", "default") for key in ("accept_dad", "accept_ra")}
# The control namespace is the router of the outside world, as a cloud's: it knows where pods are (routes.py).
_CONTROL_SYSCTLS = _QUIET6 | {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    "net/ipv4/conf/all/rp_filter": "0",
    "net/ipv4/conf/default/rp_filter": "0",
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
}


def ensure_control(layout: Layout) -> None:
    if not _add_netns(layout, "control"):
        return
    at = addresses("control")
    netns = layout.netns("control")
    kernel.in_netns(layout.netns_path("control"), lambda: kernel.write_sysctls(_CONTROL_SYSCTLS))
    kernel.ip_batch(
        netns,
        [
            "link set lo up",
            f"link add {BRIDGE} type bridge forward_delay 0",
            f"link set {BRIDGE} up",
            f"address add {at.ipv4}/24 dev {BRIDGE}",
            f"-6 address add {at.ipv6}/64 dev {BRIDGE} nodad",
            "route add unreachable default metric 4096",
            "-6 route add unreachable default metric 4096",
        ],
    )
    _mark_complete(layout, "control")


def ensure_member(layout: Layout, member: str) -> None:
    """A node's namespace, or the world's: `eth0` on the bridge, the control namespace as the default route."""
    if not _add_netns(layout, member):
        return
    at, gateway = addresses(member), addresses("control")
    kernel.in_netns(layout.netns_path(member), lambda: kernel.write_sysctls(_QUIET6))
    kernel.ip_lines(
        layout.netns("control"),
        [
            f"link add {member} type veth peer name eth0 netns {layout.netns(member)}",
            f"link set {member} master {BRIDGE} up",
        ],
    )
    kernel.ip_batch(
        layout.netns(member),
        [
            "link set lo up",
            "link set eth0 up",
            f"address add {at.ipv4}/24 dev eth0",
            f"-6 address add {at.ipv6}/64 dev eth0 nodad",
            f"route add default via {gateway.ipv4}",
            f"-6 route add default via {gateway.ipv6}",
        ],
    )
    _mark_complete(layout, member)


def remove(layout: Layout, member: str) -> None:
    """The namespace and with it the cable; nothing if there is none."""
    if layout.netns_path(member).exists():
        run(["ip", "netns", "delete", layout.netns(member)])
    # A namespace goes a while after its last process; its cable mustn't be in the way of the next one's.
    if layout.netns_path("control").exists():
        subprocess.run(
            ["ip", "-n", layout.netns("control"), "link", "delete", member], capture_output=True, check=False
        )


def remove_all(layout: Layout) -> None:
    for name in present(layout):
        run(["ip", "netns", "delete", name])


def present(layout: Layout) -> list[str]:
    """The cluster's namespaces on this machine."""
    return sorted(p.name for p in NETNS.iterdir() if layout.owns_netns(p.name)) if NETNS.exists() else []


def _add_netns(layout: Layout, member: str) -> bool:
    """False if it is there already. One that was left half-made is made anew."""
    path: Path = layout.netns_path(member)
    marker = layout.state / "netns" / member
    if path.exists() and marker.exists() and marker.read_text() == _identity(path):
        return False
    if path.exists():
        remove(layout, member)
    marker.parent.mkdir(mode=0o700, exist_ok=True)
    run(["ip", "netns", "add", layout.netns(member)])
    return True


def _mark_complete(layout: Layout, member: str) -> None:
    (layout.state / "netns" / member).write_text(_identity(layout.netns_path(member)))


def _identity(path: Path) -> str:
    try:
        found = path.stat()
    except FileNotFoundError:
        raise BedError(f"the network namespace {path} is gone") from None
    return f"{found.st_dev}:{found.st_ino}"
