"""Maps and programs of the datapath: loaded once per node, pinned, and found again after a restart.

How a restarted agent knows what is ours: everything lies under `<bpffs>/fimbria`. A map's pin name carries a hash of
its layout, and its size: a changed map is a new one next to the old one. Derived maps are filled anew; learned ones
(LEARNED) are carried over from the former map if only the size differs, and started empty with a log line if the layout
does. Until that is done, programs of either version find in the other's table what their own lacks (SHARED). A
program's pin folder carries a hash of the object, its constants and the maps it uses: when all are the same the pinned
programs are taken as they are, without verification. Pins of former versions go after the new programs are attached
everywhere (`sweep`).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from fimbria.kernel.bpf import BpfObject, Map, MapError, MapSpec, Program, array_map, prog_info
from fimbria.kernel.grace import GracePeriod
from fimbria.kernel.sweep import copy_missing

log = logging.getLogger(__name__)
OBJECTS: Final = ("pod", "host", "overlay", "socket")
LEARNED: Final = ("conntrack", "nat", "affinity", "sock_revnat", "sock_choices")
# Learned tables -> the array of tables in which programs look for what their own doesn't have.
SHARED: Final = {"conntrack": "conntrack_other", "nat": "nat_other"}
Constant = int | bool | bytes


class Datapath:
    """The node's maps and programs. `sizes` are max_entries by map name, for maps sized by configuration; `arrays` are
    those of the arrays of numbers in maps of arrays, by the outer map's name."""

    def __init__(
        self,
        bpffs: Path,
        objects: Path,
        sizes: Mapping[str, int],
        layout: Callable[[str], str],
        arrays: Mapping[str, int] | None = None,
        *,
        names: Sequence[str] = OBJECTS,
        expires: Mapping[str, int] | None = None,
    ) -> None:
        """`layout` gives a hash of the types in a map: part of its pin name. `names` are the objects to load. `expires`
        says where in a learned map's value it stands when the row is over (`kernel.sweep`)."""
        self._root = bpffs / "fimbria"
        self._objects = objects
        self._sizes = sizes
        self._layout = layout
        self._arrays = arrays or {}
        self._names = names
        self._expires = expires or {}
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, Program] = {}
        self.program_ids: dict[int, str] = {}
        self.map_ids: set[int] = set()
        self.former: dict[str, list[Map]] = {}
        self._shared: set[str] = set()
        self._live: dict[Path, Program] = {}

    @property
    def links(self) -> Path:
        """Where links are pinned."""
        return self._root / "links"

    def load(self, constants: Mapping[str, Constant]) -> None:
        """Open or create all maps, open or load all programs. Constants an object doesn't declare are ignored by it.

        Raises VerifierError, MapError or OSError naming the object; what was attached before stays attached.
        """
        self._folders()
        self._remove_half_pins()
        programs: dict[str, Program] = {}
        live, self._live = self._live, {}
        try:
            for name in self._names:
                programs.update(self._load_object(name, constants))
        except OSError:
            self._live = live
            raise
        self.programs = programs
        self.program_ids = {prog_info(p.fd).id: n for n, p in programs.items()}
        self._look_around()
        self._share()

    def carry_over(self) -> None:
        """Copy what former maps learned and today's don't know, before and after programs are swapped; learned rows of
        today are younger and stay. What programs find in former maps waits for `sweep`: a row that is copied early
        hides what the connection's next packets still change in the former map."""
        self._carry_over(n for n in LEARNED if n not in self._shared)

    def _carry_over(self, names: Iterable[str]) -> None:
        for name in names:
            for old in self.former.get(name, ()):
                try:
                    copy_missing(old, self.maps[name], self._expires.get(name))
                except MapError as error:
                    log.warning("connections of a former version are lost: %s", error)

    def repin(self) -> list[str]:
        """Pin again what somebody unpinned (or unmounted); returns the names of the pins that were missing."""
        self._folders()
        wanted: dict[Path, Map | Program] = {self._map_path(n, m.info.layout): m for n, m in self.maps.items()}
        wanted |= self._live
        missing = [p for p in wanted if not p.exists()]
        for path in missing:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            wanted[path].pin(path)
        return [p.name for p in missing]

    def sweep(self) -> None:
        """Remove pins of former versions. Only after every link runs today's programs."""
        if any(self.former.get(name) for name in LEARNED):
            # A program of the former version may have been in the middle of its work when it was replaced.
            grace = GracePeriod()
            grace.wait()
            grace.close()
            self._carry_over(LEARNED)
        self.former = {}
        self._share()
        maps = {self._map_path(n, m.info.layout) for n, m in self.maps.items()}
        for path in (self._root / "maps").iterdir():
            if path not in maps:
                log.info("removing map %s of a former version", path.name)
                path.unlink()
        folders = {p.parent for p in self._live}
        for path in (self._root / "progs").iterdir():
            if path not in folders:
                shutil.rmtree(path)
        self.map_ids = {m.info.id for m in self.maps.values()}

    def _folders(self) -> None:
        for part in ("maps", "progs", "links"):
            (self._root / part).mkdir(mode=0o700, parents=True, exist_ok=True)

    def _remove_half_pins(self) -> None:
        # An agent that died between pinning and renaming left a second name: it would keep a link alive unseen.
        for path in self._root.rglob("*_new*"):
            path.unlink()

    def _look_around(self) -> None:
        """Find the former version's maps."""
        self.former, self.map_ids = {}, {m.info.id for m in self.maps.values()}
        for path in sorted((self._root / "maps").iterdir()):
            name, digest, _ = path.name.rsplit("-", 2) if path.name.count("-") >= 2 else (path.name, "", "")
            found = self.maps.get(name)
            try:
                old = Map.open(path, name)
            except OSError:
                continue
            self.map_ids.add(old.info.id)
            if found is None or old.info.id == found.info.id:
                continue
            if self._map_path(name, found.info.layout).name.rsplit("-", 2)[1] == digest:
                self.former.setdefault(name, []).append(old)
            elif name in LEARNED:
                log.warning("map %s has another layout than before: what it learned can't be carried over", name)
        for maps in self.former.values():
            maps.sort(key=lambda m: m.info.id, reverse=True)

    def _share(self) -> None:
        """Let programs of all versions find what only another one has learned, in the newest former map first; without
        former maps there is nothing to find. What an agent left that died in between is set right as well."""
        self._shared = set()
        for name, places in SHARED.items():
            if places not in self.maps:
                continue
            array, former = self.maps[places], self.former.get(name, ())
            wanted = [*former[: array.max_entries - 1], self.maps[name]] if former else []
            try:
                for place in range(array.max_entries):
                    _set_place(array, place, wanted[place] if place < len(wanted) else None)
                self._shared.add(name)
            except MapError as error:
                log.warning("connections may be lost while programs are replaced: %s", error)

    def _load_object(self, name: str, constants: Mapping[str, Constant]) -> dict[str, Program]:
        source = (self._objects / f"{name}.bpf.o").read_bytes()
        with BpfObject(source, name) as obj:
            obj.resize({m: n for m, n in self._sizes.items() if m in obj.maps})
            shared = {n: spec for n, spec in obj.maps.items() if not spec.internal}
            reused = {n: m for n, spec in shared.items() if (m := self._open_map(n, spec)) is not None}
            obj.reuse(reused)
            mine = {c: v for c, v in constants.items() if c in obj.constants}
            if reused.keys() == shared.keys():
                folder = self._folder(name, source, mine, reused.values())
                found = self._open_programs(folder, obj.programs)
                if found is not None:
                    return found
            obj.set_constants(mine)
            with ExitStack() as templates:
                for outer in self._arrays.keys() & shared.keys() - reused.keys():
                    template = array_map(self._arrays[outer], f"{outer[:13]}_0")
                    obj.set_inner(outer, templates.enter_context(template))
                obj.load()
            for n in shared.keys() - reused.keys():
                self.maps[n] = obj.map(n)
                self.maps[n].pin(self._map_path(n, self.maps[n].info.layout))
            folder = self._folder(name, source, mine, [self.maps[n] for n in shared])
            return self._pin_programs(folder, {n: obj.program(n) for n in obj.programs})

    def _open_map(self, name: str, spec: MapSpec) -> Map | None:
        if name in self.maps:
            return self.maps[name]
        path = self._map_path(name, (spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags))
        if not path.exists():
            return None
        self.maps[name] = Map.open(path, name)
        return self.maps[name]

    def _map_path(self, name: str, layout: tuple[int, ...]) -> Path:
        kind, key, value, entries, flags = layout
        inner = f" arrays of {self._arrays[name]}, memory" if name in self._arrays else ""
        layout_text = f"{self._layout(name)} {(kind, key, value, flags)}{inner}"
        digest = hashlib.sha256(layout_text.encode()).hexdigest()[:12]
        return self._root / "maps" / f"{name}-{digest}-{entries}"

    def _folder(self, name: str, source: bytes, constants: Mapping[str, Constant], maps: Iterable[Map]) -> Path:
        digest = hashlib.sha256(source)
        digest.update(repr(sorted(constants.items())).encode())
        digest.update(repr(sorted(m.info.id for m in maps)).encode())
        return self._root / "progs" / f"{name}-{digest.hexdigest()[:12]}"

    def _open_programs(self, folder: Path, names: Iterable[str]) -> dict[str, Program] | None:
        paths = {n: folder / n for n in names}
        if not all(p.exists() for p in paths.values()):
            return None
        programs = {n: Program.open(p) for n, p in paths.items()}
        self._live |= {p: programs[n] for n, p in paths.items()}
        return programs

    def _pin_programs(self, folder: Path, programs: dict[str, Program]) -> dict[str, Program]:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, program in programs.items():
            program.pin(folder / name)
            self._live[folder / name] = program
        return programs


def _set_place(array: Map, place: int, wanted: Map | None) -> None:
    # Each change waits until no program is left that saw the place as it was: 10 ms.
    key = struct.pack("=I", place)
    found = array.lookup(key)
    if found != (struct.pack("=I", wanted.info.id) if wanted else None):
        if wanted:
            array.update(key, struct.pack("=i", wanted.fd))
        else:
            array.delete(key)
