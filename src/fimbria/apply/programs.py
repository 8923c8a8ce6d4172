"""Maps and programs of the datapath: loaded once per node, pinned, and found again after a restart.

How a restarted agent knows what is ours: everything lies under `<bpffs>/fimbria`. A map's pin name carries a hash of
its layout and size, so a changed layout is a new map next to the old one. A program's pin folder carries a hash of the
object, its constants and the maps it uses: when all are the same the pinned programs are taken as they are, without
verification. Pins of former versions go after the new programs are attached everywhere (`sweep`).
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

from fimbria.kernel.bpf import BpfObject, Map, MapSpec, Program, prog_info

log = logging.getLogger(__name__)
OBJECTS: Final = ("pod", "host", "overlay", "socket")
Constant = int | bool | bytes


class Datapath:
    """The node's maps and programs. `sizes` are max_entries by map name, for maps sized by configuration."""

    def __init__(self, bpffs: Path, objects: Path, sizes: Mapping[str, int], layout: str) -> None:
        """`layout` is a hash of all shared types: part of every map's pin name."""
        self._root = bpffs / "fimbria"
        self._objects = objects
        self._sizes = sizes
        self._layout = layout
        self.maps: dict[str, Map] = {}
        self.programs: dict[str, Program] = {}
        self.program_ids: dict[int, str] = {}
        self._live: set[Path] = set()

    @property
    def links(self) -> Path:
        """Where links are pinned."""
        return self._root / "links"

    def load(self, constants: Mapping[str, Constant]) -> None:
        """Open or create all maps, open or load all programs. Constants an object doesn't declare are ignored by it.

        Raises VerifierError, MapError or OSError naming the object; what was attached before stays attached.
        """
        for part in ("maps", "progs", "links"):
            (self._root / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        programs: dict[str, Program] = {}
        for name in OBJECTS:
            programs.update(self._load_object(name, constants))
        self.programs = programs
        self.program_ids = {prog_info(p.fd).id: n for n, p in programs.items()}

    def repin(self) -> int:
        """Pin again what somebody unpinned (or unmounted); returns how many pins were missing."""
        missing = 0
        for part in ("maps", "progs", "links"):
            (self._root / part).mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, bpf_map in self.maps.items():
            path = self._map_path(name, bpf_map.info.layout)
            if not path.exists():
                bpf_map.pin(path)
                missing += 1
        for path in self._live:
            if not path.exists():
                path.parent.mkdir(mode=0o700, exist_ok=True)
                self.programs[path.name].pin(path)
                missing += 1
        return missing

    def sweep(self) -> None:
        """Remove pins of former versions. Only after every link runs today's programs."""
        maps = {self._map_path(n, m.info.layout) for n, m in self.maps.items()}
        for path in (self._root / "maps").iterdir():
            if path not in maps:
                log.info("removing map %s of a former version", path.name)
                path.unlink()
        folders = {p.parent for p in self._live}
        for path in (self._root / "progs").iterdir():
            if path not in folders:
                shutil.rmtree(path)

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
        digest = hashlib.sha256(f"{self._layout} {layout}".encode()).hexdigest()[:12]
        return self._root / "maps" / f"{name}-{digest}"

    def _folder(self, name: str, source: bytes, constants: Mapping[str, Constant], maps: Iterable[Map]) -> Path:
        digest = hashlib.sha256(source)
        digest.update(repr(sorted(constants.items())).encode())
        digest.update(repr(sorted(m.info.id for m in maps)).encode())
        return self._root / "progs" / f"{name}-{digest.hexdigest()[:12]}"

    def _open_programs(self, folder: Path, names: Iterable[str]) -> dict[str, Program] | None:
        paths = {n: folder / n for n in names}
        if not all(p.exists() for p in paths.values()):
            return None
        self._live.update(paths.values())
        return {n: Program.open(p) for n, p in paths.items()}

    def _pin_programs(self, folder: Path, programs: dict[str, Program]) -> dict[str, Program]:
        folder.mkdir(mode=0o700, exist_ok=True)
        for name, program in programs.items():
            program.pin(folder / name)
            self._live.add(folder / name)
        return programs
