"""Runs the stories beside this file: Kubernetes objects in, what the datapath does with a frontend out.

A story is a sentence about it and then steps, each beginning with `--- `:

    --- apply                     YAML documents, created or replaced; a Node is this one (labels and addresses)
    --- delete KIND NAMESPACE/NAME
    --- settings KEY=VALUE ...    a new agent with these settings (forwarding, algorithm)
    --- restart                   a new agent: restored from the rows, everything delivered again
    --- rows                      what must be there now, all of it:
        10.96.0.1:80/TCP service 1 -> 10.0.0.1:8080 #1, 10.0.0.2:8080 #2     backends in slot order
        10.96.0.2:80/TCP service 2 -> refused                                 no slots
        node4:30080/TCP service 1 -> ...                                      a node port, of every address of nodes
        inside node4:30080/TCP service 1 -> ...                               what clients inside the cluster get
        203.0.113.1:80/TCP service 1 affinity=10800s only=10.0.0.0/8 dsr -> silent
        address 10.96.0.1 inside                                              refuses other ports, to clients inside
        address 203.0.113.1                                                   the same, to all clients
        table 1: #1 x100, #2 x50                                              weights
        idle 10.0.0.3:8080/TCP #3                                             a backend in no slot
        warning shop/web: text
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from fimbria.compute import service_frontends as front
from fimbria.compute.service import BACKENDS, FRONTENDS, MEMBERS, RANGES, SLOTS, TABLES, Delta, ServiceCompute
from fimbria.compute.service_frontends import Defaults
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix, is_v4, unpack
from fimbria.model.protocol import NAMES
from fimbria.model.rows import Frontend, FrontendKey, MemberKey, SlotKey
from fimbria.model.service import EndpointSlice, NodeTopology, Service, ServiceKey
from fimbria.sources.k8s.services import to_service, to_slice, to_topology
from fimbria.sources.k8s.types import core

STORIES = sorted(Path(__file__).parent.glob("*.txt"))
NODE = "here"
Step = tuple[str, str]


def parse(text: str) -> list[Step]:
    """The steps as (heading, body). The sentence before the first one is for people."""
    _, *parts = ("\n" + text).split("\n--- ")
    steps = [part.partition("\n") for part in parts]
    return [(heading.strip(), body) for heading, _, body in steps]


class Story:
    """One run. `kernel` is fed by the deltas alone, and must always equal `all_rows`."""

    def __init__(self) -> None:
        self.services: dict[ServiceKey, Service] = {}
        self.slices: dict[tuple[str, str], EndpointSlice] = {}
        self.node = NodeTopology()
        self.defaults = Defaults()
        self.compute = new_compute(self.defaults)
        self.kernel = self.compute.all_rows()

    def step(self, heading: str, body: str) -> None:
        word, *rest = heading.split()
        if word == "apply":
            for document in yaml.safe_load_all(body):
                self.apply(document)
        elif word == "delete":
            self.delete(rest[0], *rest[1].split("/"))
        elif word == "restart":
            self.restart()
        elif word == "settings":
            self.defaults = Defaults(**dict(text.split("=") for text in rest))
            self.restart()
        elif word == "rows":
            assert self.rows() == [line.strip() for line in body.splitlines() if line.strip()]
        else:
            raise ValueError(f"no such step: {heading!r}")

    def apply(self, document: dict[str, Any]) -> None:
        raw = msgspec.json.encode(document)
        if document["kind"] == "Service":
            service = to_service(msgspec.json.decode(raw, type=core.Service))
            self.services[service.key] = service
            self.update(service.key)
        elif document["kind"] == "Node":
            self.node = to_topology(msgspec.json.decode(raw, type=core.Node))
            self.write(self.compute.set_topology(self.node))
        else:
            part = to_slice(msgspec.json.decode(raw, type=core.EndpointSlice))
            meta = document["metadata"]
            known = self.slices.pop((meta["namespace"], meta["name"]), None)
            if part is not None:
                self.slices[meta["namespace"], meta["name"]] = part
            for key in {p.service for p in (known, part) if p is not None}:
                self.update(key)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        if kind == "Service":
            del self.services[ServiceKey(namespace, name)]
            self.update(ServiceKey(namespace, name))
        elif (part := self.slices.pop((namespace, name), None)) is not None:
            self.update(part.service)

    def update(self, key: ServiceKey) -> None:
        parts = [s for s in self.slices.values() if s.service == key]
        self.write(self.compute.update(key, self.services.get(key), parts))

    def write(self, delta: Delta) -> None:
        for name, rows in delta.upserts.items():
            self.kernel[name].update(rows)
        for name, keys in delta.deletes.items():
            for key in keys:
                del self.kernel[name][key]

    def restart(self) -> None:
        rows, self.compute = self.kernel, new_compute(self.defaults)
        self.kernel = self.compute.all_rows()
        self.compute.restore(rows[FRONTENDS], rows[SLOTS], rows[BACKENDS])
        self.compute.set_topology(self.node)
        for key in reversed(self.services):
            self.update(key)
        self.compute.settle()

    def rows(self) -> list[str]:
        rows = self.compute.all_rows()
        assert self.kernel == rows
        lines, idle = [], set(rows[BACKENDS])
        order = sorted(rows[FRONTENDS], key=lambda f: (f.addr, f.port, f.proto, f.scope))
        for frontend in order:
            row = rows[FRONTENDS][frontend]
            if row.flags & front.ADDRESS:
                continue
            numbers = [rows[SLOTS][SlotKey(row.service, slot)] for slot in range(row.count)]
            idle -= set(numbers)
            found = [f"{endpoint(rows[BACKENDS][n])} #{n}" for n in numbers]
            nothing = "silent" if row.flags & front.SILENT else "refused"
            lines.append(f"{title(frontend, row, rows)} -> {', '.join(found) or nothing}")
            if row.flags & front.AFFINITY:
                members = {key for key in rows[MEMBERS] if key.service == row.service}
                assert members == {MemberKey(row.service, number) for number in numbers}
        for key in order:
            if rows[FRONTENDS][key].flags & front.ADDRESS:
                inside = " inside" if rows[FRONTENDS][key].flags & front.CLUSTER_IP else ""
                lines.append(f"address {unpack(key.addr)}{inside}")
        for number, table in sorted(rows[TABLES].items()):
            lines.append(f"table {number}: {', '.join(f'#{b} x{w}' for b, w in table.backends) or 'empty'}")
        lines += [f"idle {socket_name(rows[BACKENDS][n])} #{n}" for n in sorted(idle)]
        lines += [f"warning {key}: {text}" for key in sorted(self.services) for text in self.compute.warnings(key)]
        return lines


WORDS = {front.HOST_PORT: "host-port", front.TABLE: "table", front.HASH: "hash", front.DIRECT_RETURN: "dsr"}


def title(frontend: FrontendKey, row: Frontend, rows: dict[str, dict[Any, Any]]) -> str:
    """All about a frontend apart from where it leads."""
    name = socket_name(frontend)
    if row.flags & front.NODE_PORT:
        assert frontend.addr in front.UNSPECIFIED.values()
        name = f"node{4 if is_v4(frontend.addr) else 6}:{frontend.port}/{NAMES[frontend.proto]}"
    words = [name, f"service {row.service}"]
    if frontend.scope:
        assert rows[FRONTENDS][FrontendKey(frontend.addr, frontend.port, frontend.proto)].flags & front.TWO_SCOPES
        words.insert(0, "inside")
    if row.flags & front.TWO_SCOPES:
        assert FrontendKey(frontend.addr, frontend.port, frontend.proto, 1) in rows[FRONTENDS]
    if row.flags & front.AFFINITY:
        words.append(f"affinity={row.affinity_seconds}s")
    if row.flags & front.SOURCE_RANGES:
        keys = [key for key in rows[RANGES] if key.service == row.service]
        ranges = ",".join(sorted(str(Prefix(key.addr, key.prefixlen - 32)) for key in keys))
        words.append(f"{'except' if row.flags & front.SOURCE_DENY else 'only'}={ranges}")
    words += [word for flag, word in WORDS.items() if row.flags & flag]
    return " ".join(words)


def endpoint(row: Any) -> str:
    text = unpack(row.addr)
    return f"[{text}]:{row.port}" if ":" in text else f"{text}:{row.port}"


def socket_name(row: Any) -> str:
    return f"{endpoint(row)}/{NAMES[row.proto]}"


def new_compute(defaults: Defaults) -> ServiceCompute:
    return ServiceCompute(NODE, Numbers("service ports"), Numbers("backends"), defaults)


@pytest.mark.parametrize("story", STORIES, ids=lambda path: path.stem)
def test_story(story: Path) -> None:
    run = Story()
    steps = parse(story.read_text())
    assert any(heading == "rows" for heading, _ in steps)
    for heading, body in steps:
        run.step(heading, body)


def test_there_are_stories() -> None:
    assert len(STORIES) >= 28


def test_a_wrong_story_fails() -> None:
    with pytest.raises(AssertionError):
        Story().step("rows", "10.96.0.1:80/TCP service 1 -> refused")
    with pytest.raises(ValueError, match="no such step"):
        Story().step("row", "")
