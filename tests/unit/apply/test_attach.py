"""When links are attached, when their programs are swapped, what counts as intact; on links that only remember."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from fimbria.apply import attach
from fimbria.apply.attach import PinnedLinks
from fimbria.apply.programs import Datapath
from fimbria.apply.rows import Delta
from fimbria.kernel.bpf import BpfError, Link, LinkInfo, Program

PROGRAMS = {"from_pod": 1, "to_pod": 2}


class FakeLink:
    """A link of the kernel; `pins` are real files in a folder of the test's."""

    by_path: ClassVar[dict[Path, FakeLink]] = {}

    def __init__(self, prog_id: int, log: list[str]) -> None:
        self.prog_id, self.log, self.there = prog_id, log, True

    @classmethod
    def open(cls, path: Path) -> FakeLink:
        if not path.exists():
            raise BpfError(2, "no pin")
        return cls.by_path[path]

    def info(self) -> LinkInfo:
        return LinkInfo(0, 1, self.prog_id, 0, 10 if self.there else 0, 0)

    def update(self, program: Any) -> None:
        self.log.append(f"swap {program.name}")
        self.prog_id = PROGRAMS[program.name]

    def pin(self, path: Path) -> None:
        path.touch()
        self.by_path[path] = self

    def close(self) -> None:
        self.log.append("close")


class FakeProgram:
    def __init__(self, name: str) -> None:
        self.name = name


class FakeDatapath:
    def __init__(self, folder: Path, log: list[str]) -> None:
        self.links = folder
        self.log = log
        self.programs = {n: FakeProgram(n) for n in PROGRAMS}
        self.program_ids = {i: n for n, i in PROGRAMS.items()}

    def carry_over(self) -> None:
        self.log.append("carry over")


class Hooks(PinnedLinks[str]):
    name = "links"

    def __init__(self, datapath: Datapath, log: list[str]) -> None:
        super().__init__(datapath)
        self.log = log

    def parse(self, pin: str) -> str | None:
        return pin.removeprefix("our-") if pin.startswith("our-") else None

    def pin_name(self, hook: str) -> str:
        return f"our-{hook}"

    def attached(self, hook: str, info: LinkInfo) -> bool:
        return info.ifindex == 10

    def attach(self, hook: str, program: Program) -> Link:
        self.log.append(f"attach {program.name}")
        return cast(Link, FakeLink(PROGRAMS[program.name], self.log))


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, log: list[str]) -> Callable[[], Hooks]:
    monkeypatch.setattr(attach, "Link", FakeLink)
    monkeypatch.setattr(FakeLink, "by_path", {})
    return lambda: Hooks(cast(Datapath, FakeDatapath(tmp_path, log)), log)


def both(hooks: Hooks, **upserts: str) -> None:
    for order in ("in", "swap"):
        assert hooks.write(Delta(upserts), order=order) == {}


def test_a_fresh_link_is_attached_at_once_and_not_swapped(make: Callable[[], Hooks], log: list[str]) -> None:
    hooks = make()
    both(hooks, a="from_pod")
    assert log == ["attach from_pod"]
    assert hooks.read() == {"a": "from_pod"} and hooks.intact()


def test_a_running_link_is_left_alone_until_the_swap(make: Callable[[], Hooks], log: list[str]) -> None:
    both(make(), a="from_pod")
    restarted = make()
    restarted.read()
    log.clear()
    assert restarted.write(Delta({"a": "to_pod"}), order="in") == {}
    assert log == []
    restarted.write(Delta({"a": "to_pod"}), order="swap")
    assert log == ["carry over", "swap to_pod", "carry over"]
    assert restarted.read() == {"a": "to_pod"}


def test_a_detached_link_is_made_anew(make: Callable[[], Hooks], log: list[str], tmp_path: Path) -> None:
    hooks = make()
    both(hooks, a="from_pod")
    FakeLink.by_path[tmp_path / "our-a"].there = False
    assert hooks.read() == {"a": "detached"} and not hooks.intact()
    log.clear()
    both(hooks, a="from_pod")
    assert log == ["close", "attach from_pod"] and hooks.intact()


def test_a_pin_that_is_gone_is_made_without_a_new_link(
    make: Callable[[], Hooks], log: list[str], tmp_path: Path
) -> None:
    hooks = make()
    both(hooks, a="from_pod")
    (tmp_path / "our-a").unlink()
    assert hooks.read() == {} and not hooks.intact()
    log.clear()
    both(hooks, a="from_pod")
    assert "attach from_pod" not in log and hooks.intact()


def test_a_strangers_program_in_our_link(make: Callable[[], Hooks], tmp_path: Path) -> None:
    hooks = make()
    both(hooks, a="from_pod")
    FakeLink.by_path[tmp_path / "our-a"].prog_id = 4_000_000_000
    assert not hooks.intact() and hooks.read() == {"a": "id 4000000000"}
    both(hooks, a="from_pod")
    assert hooks.read() == {"a": "from_pod"} and hooks.intact()


def test_other_pins_are_not_ours(make: Callable[[], Hooks], tmp_path: Path) -> None:
    (tmp_path / "theirs").touch()
    assert make().read() == {}


def test_one_that_cannot_be_attached_fails_alone(make: Callable[[], Hooks], monkeypatch: pytest.MonkeyPatch) -> None:
    hooks = make()
    attach_one = hooks.attach

    def refuse(hook: str, program: Program) -> Link:
        if hook == "bad":
            raise BpfError(19, "attach from_pod: no such device")
        return attach_one(hook, program)

    monkeypatch.setattr(hooks, "attach", refuse)
    failed = hooks.write(Delta({"bad": "from_pod", "good": "to_pod"}), order="in")
    assert list(failed) == ["bad"] and "no such device" in failed["bad"]
    assert hooks.read() == {"good": "to_pod"}


class FakeFilters:
    """Filters that guard hooks."""

    def __init__(self) -> None:
        self.hooks: set[attach.DeviceHook] = set()

    def guard(self, hook: attach.DeviceHook, _program: Any) -> None:
        self.hooks.add(hook)

    def guards(self, hook: attach.DeviceHook) -> bool:
        return hook in self.hooks

    def write(self, delta: Delta[attach.DeviceHook, str], *, order: str) -> dict[attach.DeviceHook, str]:
        assert order == "out"
        self.hooks -= delta.deletes
        return {}


def test_a_hook_that_is_promoted_while_it_is_read_is_no_drift(
    tmp_path: Path, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in a thread: pins are listed before the link is pinned, filters asked for when its filter is gone."""
    target = attach.TcxTarget(cast(Datapath, FakeDatapath(tmp_path, log)), cast(Any, FakeFilters()))
    hook = attach.DeviceHook(8, attach.INGRESS)
    target.write(Delta({hook: "from_pod"}), order="in")
    assert target.read() == {hook: "from_pod"}, "guarded by its filter"

    def listed_before(_self: object) -> dict[attach.DeviceHook, str]:
        target.promote(hook, cast(Link, FakeLink(1, log)))
        return {}

    monkeypatch.setattr(PinnedLinks, "read", listed_before)
    assert target.read() == {hook: "from_pod"}
