"""XDP programs on real devices: modes, restarts, repairs, and the programs of others."""

import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from fimbria.agent import datapath as dp
from fimbria.agent.config import AgentConfig
from fimbria.apply.programs import Datapath
from fimbria.apply.rows import Delta, compare
from fimbria.apply.xdp import PROGRAM, XdpHook, XdpTarget
from fimbria.kernel.bpf import BpfObject, Link, Program, attach_xdp, prog_info
from fimbria.model.network import DeviceSet
from fimbria.model.rows import NO_ADDR
from lab import Space

T = TypeVar("T")
LO = 1  # has no driver that could run XDP
SMALL = {"ipcache": 16, "conntrack": 16, "nat": 16, "frontends": 16, "service_slots": 16, "backends": 16}

CONSTANTS = dp.constants(
    AgentConfig(node_name="n"), DeviceSet(0, bytes(6), 0, (), 1500, 1450), (NO_ADDR,) * 2, (NO_ADDR,) * 2
)


@dataclass
class Node:
    """A namespace with a veth `up0`, and a BPF file system."""

    space: Space
    bpffs: Path
    ifindex: int
    datapath: Datapath

    def agent(self) -> XdpTarget:
        """As an agent has it that has just started."""
        return XdpTarget(self.datapath)

    def do(self, call: Callable[[], T]) -> T:
        return self.space.inside(call)

    def bring(self, target: XdpTarget, *wanted: XdpHook) -> dict[XdpHook, str]:
        """One pass of the apply loop; returns failures."""
        rows = dict.fromkeys(wanted, PROGRAM)
        delta = compare(rows, self.do(target.read))
        failures: dict[XdpHook, str] = {}
        for order in ("in", "swap"):
            failures |= self.do(lambda order=order: target.write(Delta(rows), order=order))  # type: ignore[misc]
        self.do(lambda: target.write(Delta(deletes=delta.deletes), order="out"))
        return failures

    def mode(self, device: str = "up0") -> str:
        """As ip shows it: empty, `xdp` or `xdpgeneric`."""
        shown = subprocess.run(
            ["ip", "-n", self.space.name, "link", "show", device], check=True, capture_output=True, text=True
        ).stdout
        found = re.search(r" (xdp\w*) ", shown)
        return found[1] if found else ""

    def pins(self) -> list[str]:
        return sorted(p.name for p in self.datapath.links.iterdir())


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    bpffs = tmp_path / "bpffs"
    bpffs.mkdir()
    subprocess.run(["mount", "-t", "bpf", "bpf", str(bpffs)], check=True)
    space = Space("xa")
    try:
        space.ip("link add up0 type veth peer name up1")
        space.ip("link set up0 up")
        layouts = dp.Layouts()
        datapath = Datapath(bpffs, dp.objects_folder(), SMALL, layouts.of_map, names=("xdp",))
        datapath.load(CONSTANTS)
        yield Node(space, bpffs, space.ifindex("up0"), datapath)
    finally:
        space.close()
        subprocess.run(["umount", "-l", str(bpffs)], check=True)


@pytest.fixture
def stranger() -> Iterator[Program]:
    """Somebody else's program."""
    with BpfObject(dp.objects_folder() / "xdp.bpf.o") as obj:
        obj.resize({n: s for n, s in SMALL.items() if n in obj.maps})
        obj.set_constants({n: v for n, v in CONSTANTS.items() if n in obj.constants})
        obj.load()
        with obj.program(PROGRAM) as program:
            yield program


@pytest.mark.parametrize(("mode", "shown"), [("native", "xdp"), ("best-effort", "xdp"), ("generic", "xdpgeneric")])
def test_modes(node: Node, mode: str, shown: str) -> None:
    hook = XdpHook(node.ifindex, mode)
    target = node.agent()
    assert node.bring(target, hook) == {}
    assert (node.mode(), node.pins()) == (shown, [f"xdp-{node.ifindex}-{mode}"])
    assert node.do(target.read) == {hook: PROGRAM} and target.intact()
    assert node.bring(node.agent()) == {}
    assert (node.mode(), node.pins()) == ("", [])


def test_a_device_whose_driver_cannot(node: Node) -> None:
    target = node.agent()
    failures = node.bring(target, XdpHook(LO, "native"))
    assert list(failures) == [XdpHook(LO, "native")] and node.mode("lo") == ""
    assert node.bring(target, XdpHook(LO, "best-effort")) == {}
    assert node.mode("lo") == "xdpgeneric"


def test_a_restarted_agent_takes_its_link_over(node: Node) -> None:
    hook = XdpHook(node.ifindex, "native")
    node.bring(node.agent(), hook)
    link = Link.open(node.datapath.links / f"xdp-{node.ifindex}-native")
    again = node.agent()
    assert node.do(again.read) == {hook: PROGRAM}
    assert node.bring(again, hook) == {}
    assert Link.open(node.datapath.links / f"xdp-{node.ifindex}-native").info().id == link.info().id
    link.close()


def test_what_is_detached_is_attached_again(node: Node) -> None:
    hook = XdpHook(node.ifindex, "native")
    target = node.agent()
    node.bring(target, hook)
    with Link.open(node.datapath.links / f"xdp-{node.ifindex}-native") as link:
        link.detach()
    assert node.mode() == "" and not target.intact()
    assert node.do(target.read) == {hook: "detached"}
    assert node.bring(target, hook) == {}
    assert node.mode() == "xdp" and target.intact()


def test_what_is_unpinned_is_pinned_again(node: Node) -> None:
    hook = XdpHook(node.ifindex, "native")
    target = node.agent()
    node.bring(target, hook)
    (node.datapath.links / f"xdp-{node.ifindex}-native").unlink()
    assert not target.intact()
    assert node.bring(target, hook) == {}
    assert target.intact() and node.mode() == "xdp"


@pytest.mark.parametrize(("mode", "name"), [("native", PROGRAM), ("generic", "from_device_skb")])
def test_a_new_program_runs_in_the_same_mode(node: Node, mode: str, name: str) -> None:
    hook = XdpHook(node.ifindex, mode)
    node.bring(node.agent(), hook)
    node.datapath.load({**CONSTANTS, "cfg_nat_port_min": 50001})
    fresh = {p.name: i for i, p in ((prog_info(p.fd).id, p) for p in node.datapath.programs.values())}
    target = node.agent()
    assert node.bring(target, hook) == {}
    with Link.open(node.datapath.links / f"xdp-{node.ifindex}-{mode}") as link:
        assert link.info().prog_id == fresh[name]


def test_another_mode_takes_the_place(node: Node) -> None:
    native, generic = XdpHook(node.ifindex, "native"), XdpHook(node.ifindex, "generic")
    node.bring(node.agent(), native)
    assert node.bring(node.agent(), generic) == {}
    assert (node.mode(), node.pins()) == ("xdpgeneric", [f"xdp-{node.ifindex}-generic"])


def test_a_device_that_is_gone(node: Node) -> None:
    hook = XdpHook(node.ifindex, "native")
    target = node.agent()
    node.bring(target, hook)
    node.space.ip("link del up0")
    assert node.do(target.read) == {hook: "detached"}
    assert node.bring(target) == {} and node.pins() == []


@pytest.mark.parametrize("flags", [2, 4])
@pytest.mark.parametrize("mode", ["native", "generic", "best-effort"])
def test_somebody_elses_program_stays(node: Node, stranger: Program, mode: str, flags: int) -> None:
    hook = XdpHook(node.ifindex, mode)
    target = node.agent()
    with node.do(lambda: attach_xdp(stranger, node.ifindex, flags)) as link:
        failures = node.bring(target, hook)
        assert f"{hook}: another XDP program is attached there" in failures[hook]
        assert link.info().ifindex == node.ifindex and node.pins() == []
        link.detach()
    assert node.bring(target, hook) == {}


def test_pins_of_others_are_none_of_ours(node: Node) -> None:
    target = node.agent()
    for pin in ("xdp-3", "xdp-native-3", "xdp-3-fast", "tcx-ingress-3", "cgroup-connect4", "xdp--native"):
        assert target.parse(pin) is None
    hook = XdpHook(3, "best-effort")
    assert target.parse(target.pin_name(hook)) == hook
