"""One node's part: what its agent and observer answer, the kernel's state, the journal. Errors are noted, not fatal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from fimbria.cli.local import Local, Refused, Unreachable
from fimbria.cli.sysdump import machine
from fimbria.cli.sysdump.archive import Archive, Full, safe
from fimbria.release import RELEASE

MOST_MAP_ROWS: Final = 5000
MOST_TABLE_ROWS: Final = 20_000  # an agent answers a table in one piece, in its own memory
MOST_DETAILS: Final = 200
MOST_JOURNAL: Final = 2000
FLOWS: Final = 1000
LAST: Final = "errors.json"  # the file that shows that nothing is missing behind it
QUICK, NORMAL, FULL = "quick", "normal", "full"
TABLES: Final = {"identities": "identities", "ipcache": "", "services": "services", "policies": "policies"}


class Skipped(Exception):
    """Why something wasn't even tried; one sentence."""


@dataclass(slots=True)
class Notes:
    """What couldn't be had, and why: file -> sentence."""

    errors: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, error: BaseException) -> None:
        """Note one."""
        text = error.message if isinstance(error, (Unreachable, Refused)) else str(error)
        self.errors[name] = (text.strip() or type(error).__name__).splitlines()[0]


class Node:
    """Collects into an archive, for at most `seconds`."""

    def __init__(self, archive: Archive, agent: Local, *, detail: str = NORMAL, seconds: float = 45.0) -> None:
        """`detail` is QUICK (no tables, no maps), NORMAL (large ones left out) or FULL."""
        self.notes = Notes()
        self.seen: dict[str, Any] = {}  # what the page is made of
        self._archive = archive
        self._agent = agent
        self._observer = Local("observer", agent.path.with_name("observer.sock"))
        self._detail = detail
        self._deadline = time.monotonic() + seconds
        self._silent: dict[str, str] = {}
        self._status: dict[str, Any] = {}

    def collect(self) -> Notes:
        """Everything. Returns what failed, which is also in errors.json."""
        for step in (self._about, self._tables, self._kernel, self._bpf, self._journal, self._maps):
            step()
        self._take(LAST, lambda: self._archive.json(LAST, self.notes.errors), last=True)
        return self.notes

    def _take(self, name: str, work: Callable[[], object], *, last: bool = False) -> None:
        try:
            if time.monotonic() > self._deadline and not last:
                raise Skipped("no time was left")
            work()
        except (Unreachable, Refused, Skipped, Full, OSError, ValueError, KeyError, TypeError) as error:
            self.notes.add(name, error)

    def _ask(self, who: Local, *parts: str, **query: str) -> Any:
        """Once somebody didn't answer, he isn't asked again: each time would cost the whole patience."""
        if who.who in self._silent:
            raise Skipped(self._silent[who.who])
        try:
            return who.get(*parts, **query)
        except Unreachable as error:
            self._silent[who.who] = error.message.splitlines()[0]
            raise

    def _json(self, name: str, *parts: str, who: Local | None = None, **query: str) -> Any:
        found: Any = None

        def work() -> None:
            nonlocal found
            found = self._ask(who or self._agent, *parts, **query)
            if name in ("status.json", "drops.json", "plan.json"):
                self.seen[name] = found
            self._archive.json(name, found)

        self._take(name, work)
        return found

    def _about(self) -> None:
        self._status = self._json("status.json", "status") or {}
        self._take("version.json", lambda: self._archive.json("version.json", self._version()))
        self._take("settings.json", lambda: self._archive.json("settings.json", settings(self._status.get("pid"))))
        self._take("process.txt", lambda: self._archive.lines("process.txt", process(self._status.get("pid"))))
        self._json("observer.json", "status", who=self._observer)
        self._take("flows/dropped.ndjson", self._flows)
        self._take("metrics.txt", self._metrics)
        self._json("plan.json", "plan")
        self._json("maps.json", "maps")
        self._json("drops.json", "maps", "metrics")

    def _version(self) -> dict[str, Any]:
        return {"fimbria": RELEASE, "agent": self._status.get("version"), "kernel": os.uname().release,
                "python": sys.version.split()[0], "node": self._status.get("node"),
                "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}  # fmt: skip

    def _metrics(self) -> None:
        if "agent" in self._silent:
            raise Skipped(self._silent["agent"])
        self._archive.lines("metrics.txt", self._agent.text("metrics").splitlines(keepends=True))

    def _flows(self) -> None:
        if "observer" in self._silent:
            raise Skipped(self._silent["observer"])
        text = self._observer.text("flows", verdict="dropped", last=str(FLOWS))
        self._archive.lines("flows/dropped.ndjson", text.splitlines(keepends=True))

    def _tables(self) -> None:
        self._json("nodes.json", "nodes")
        endpoints = self._json("endpoints.json", "endpoints") or ()
        for name, counted in TABLES.items():
            rows = self._status.get(counted) if counted else self._status.get("rows", {}).get(name)
            self._take(f"{name}.json", lambda name=name, rows=rows: self._table(name, rows or 0))  # type: ignore[misc]
        if self._detail != QUICK:
            for e in endpoints[:MOST_DETAILS]:
                self._json(f"endpoints/{e['id']}.json", "endpoints", str(e["id"]))

    def _table(self, name: str, rows: int) -> None:
        if self._detail == QUICK and name != "policies":
            raise Skipped("left out because of --quick")
        if self._detail != FULL and rows > MOST_TABLE_ROWS:
            raise Skipped(f"left out because it has {rows} rows; --full takes it")
        self._archive.json(f"{name}.json", self._ask(self._agent, name))

    def _maps(self) -> None:
        if self._detail == QUICK:
            return
        most = "0" if self._detail == FULL else str(MOST_MAP_ROWS)
        for row in self._json_again("maps") or ():
            if row["name"] not in ("metrics", "events") and row["key_size"]:
                self._json(f"maps/{safe(row['name'])}.json", "maps", row["name"], most=most)

    def _json_again(self, *parts: str) -> Any:
        try:
            return self._ask(self._agent, *parts)
        except (Unreachable, Refused, Skipped):
            return None  # noted where it was asked first

    def _kernel(self) -> None:
        for path, name in machine.FILES.items():
            if os.path.exists(path):
                self._take(
                    f"kernel/{name}",
                    lambda path=path, name=name: self._archive.lines(  # type: ignore[misc]
                        f"kernel/{name}", machine.read(path).splitlines(keepends=True)
                    ),
                )
        self._take("kernel/sysctl.txt", lambda: self._archive.lines("kernel/sysctl.txt", machine.sysctls()))
        self._functions("network", machine.network())

    def _bpf(self) -> None:
        self._functions("bpf", machine.bpf())
        pins = Path("/sys/fs/bpf")
        self._take("bpf/pins.txt", lambda: self._archive.lines("bpf/pins.txt", listing(pins)))

    def _functions(self, folder: str, functions: dict[str, Callable[[], Any]]) -> None:
        for name, function in functions.items():
            path = f"{folder}/{name}.json"
            self._take(path, lambda path=path, function=function: self._archive.json(path, function()))  # type: ignore[misc]

    def _journal(self) -> None:
        run = self._agent.path.parent
        self._take("journal/files.txt", lambda: self._archive.lines("journal/files.txt", listing(run)))
        files = sorted((run / "state").rglob("*.json"))[:MOST_JOURNAL]
        self._take("journal/journal.ndjson", lambda: self._archive.lines("journal/journal.ndjson", journal(files)))
        for path in sorted(Path("/etc/cni/net.d").glob("*.conf*")):
            name = f"cni/{safe(path.name)}"
            if not path.name.lower().endswith("kubeconfig"):
                self._take(name, lambda path=path, name=name: self._archive.text(name, machine.read(path)))  # type: ignore[misc]


def settings(pid: int | None) -> dict[str, Any]:
    """How the agent was started. Raises OSError."""
    if pid is None:
        raise Skipped("the agent didn't say which process it is")
    raw = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    variables = (v.decode(errors="replace").partition("=") for v in raw if v.startswith(b"FIMBRIA_"))
    arguments = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").split(b"\0")
    return {
        "arguments": [a.decode(errors="replace") for a in arguments],
        "environment": {name: value for name, _, value in variables},
    }


def process(pid: int | None) -> Iterator[str]:
    """Memory, limits and descriptors of the agent. Raises OSError."""
    if pid is None:
        raise Skipped("the agent didn't say which process it is")
    for name in ("status", "limits", "cgroup", "schedstat"):
        yield f"--- {name}\n{machine.read(f'/proc/{pid}/{name}')}\n"
    yield f"--- descriptors\n{len(os.listdir(f'/proc/{pid}/fd'))}\n"


def listing(root: Path) -> Iterator[str]:
    """Every file below a folder with mode, size and age."""
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}")
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(folder, name)
            try:
                found = os.lstat(path)
            except OSError:
                continue
            age = time.time() - found.st_mtime
            yield f"{found.st_mode:o} {found.st_size:>9} {age:>12.0f} s  {path}\n"


def journal(files: list[Path]) -> Iterator[str]:
    """A line for each file: its name and what is in it."""
    for path in files:
        try:
            text = " ".join(machine.read(path, 1 << 16).split())
        except OSError as error:
            text = f"can't be read: {error.strerror}"
        yield f"{path.name} {text}\n"
