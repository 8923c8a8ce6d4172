"""Runs the stories beside this file: Kubernetes objects in, what the datapath does with a frontend out.

A story is a sentence about it and then steps, each beginning with `--- `:

    --- apply                     YAML documents, created or replaced
    --- delete KIND NAMESPACE/NAME
    --- restart                   a new agent: restored from the rows, everything delivered again
    --- rows                      what must be there now, all of it:
        10.96.0.1:80/TCP service 1 -> 10.0.0.1:8080 #1, 10.0.0.2:8080 #2     backends in slot order
        10.96.0.2:80/TCP service 2 -> refused                                 no slots
        idle 10.0.0.3:8080/TCP #3                                             a backend in no slot
        warning shop/web: text
"""

from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from fimbria.compute.service import BACKENDS, FRONTENDS, SLOTS, ServiceCompute
from fimbria.decide.numbers import Numbers
from fimbria.model.address import unpack
from fimbria.model.rows import SlotKey
from fimbria.model.service import EndpointSlice, Service, ServiceKey
from fimbria.sources.k8s.services import PROTOCOLS, to_service, to_slice
from fimbria.sources.k8s.types import core

STORIES = sorted(Path(__file__).parent.glob("*.txt"))
NODE = "here"
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
Step = tuple[str, str]


def parse(text: str) -> list[Step]:
    """The steps as (heading, body). The sentence before the first one is for people."""
    _, *parts = ("\n" + text).split("\n--- ")
    steps = [part.partition("\n") for part in parts]
    return [(heading.strip(), body) for heading, _, body in steps]


class Story:
    def __init__(self) -> None:
        self.services: dict[ServiceKey, Service] = {}
        self.slices: dict[tuple[str, str], EndpointSlice] = {}
        self.compute = new_compute()

    def step(self, heading: str, body: str) -> None:
        word, *rest = heading.split()
        if word == "apply":
            for document in yaml.safe_load_all(body):
                self.apply(document)
        elif word == "delete":
            self.delete(rest[0], *rest[1].split("/"))
        elif word == "restart":
            self.restart()
        elif word == "rows":
            assert self.rows() == [line.strip() for line in body.splitlines() if line.strip()]
        else:
            raise ValueError(f"no such step: {heading!r}")

    def apply(self, document: dict[str, Any]) -> None:
        if document["kind"] == "Service":
            service = to_service(msgspec.convert(document, core.Service))
            self.services[service.key] = service
            self.update(service.key)
        else:
            assert document["kind"] == "EndpointSlice"
            part = to_slice(msgspec.convert(document, core.EndpointSlice))
            if part is not None:
                self.slices[part.service.namespace, part.name] = part
                self.update(part.service)

    def delete(self, kind: str, namespace: str, name: str) -> None:
        if kind == "Service":
            del self.services[ServiceKey(namespace, name)]
            self.update(ServiceKey(namespace, name))
        elif (part := self.slices.pop((namespace, name), None)) is not None:
            self.update(part.service)

    def update(self, key: ServiceKey) -> None:
        self.compute.update(key, self.services.get(key), [s for s in self.slices.values() if s.service == key])

    def restart(self) -> None:
        rows, self.compute = self.compute.all_rows(), new_compute()
        self.compute.restore(rows[FRONTENDS], rows[SLOTS], rows[BACKENDS])
        for key in reversed(self.services):
            self.update(key)
        self.compute.settle()

    def rows(self) -> list[str]:
        rows = self.compute.all_rows()
        lines, idle = [], set(rows[BACKENDS])
        for frontend in sorted(rows[FRONTENDS], key=lambda f: (f.addr, f.port, f.proto)):
            row = rows[FRONTENDS][frontend]
            numbers = [rows[SLOTS][SlotKey(row.service, slot)] for slot in range(row.count)]
            idle -= set(numbers)
            found = [f"{endpoint(rows[BACKENDS][n])} #{n}" for n in numbers]
            lines.append(f"{socket_name(frontend)} service {row.service} -> {', '.join(found) or 'refused'}")
        lines += [f"idle {socket_name(rows[BACKENDS][n])} #{n}" for n in sorted(idle)]
        lines += [f"warning {key}: {text}" for key in sorted(self.services) for text in self.compute.warnings(key)]
        return lines


def endpoint(row: Any) -> str:
    text = unpack(row.addr)
    return f"[{text}]:{row.port}" if ":" in text else f"{text}:{row.port}"


def socket_name(row: Any) -> str:
    return f"{endpoint(row)}/{PROTOCOL_NAMES[row.proto]}"


def new_compute() -> ServiceCompute:
    return ServiceCompute(NODE, Numbers("service ports"), Numbers("backends"))


@pytest.mark.parametrize("story", STORIES, ids=lambda path: path.stem)
def test_story(story: Path) -> None:
    run = Story()
    steps = parse(story.read_text())
    assert any(heading == "rows" for heading, _ in steps)
    for heading, body in steps:
        run.step(heading, body)


def test_there_are_stories() -> None:
    assert len(STORIES) >= 8


def test_a_wrong_story_fails() -> None:
    with pytest.raises(AssertionError):
        Story().step("rows", "10.96.0.1:80/TCP service 1 -> refused")
    with pytest.raises(ValueError, match="no such step"):
        Story().step("row", "")
