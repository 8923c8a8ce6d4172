"""Creating and removing, against a client that remembers: what must be left behind, and what must not."""

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import pytest

from fimbria.cli.connectivity import run as subject
from fimbria.cli.connectivity.run import NAMESPACES, NODES, CantRun, Settings, Slice, Whole
from fimbria.sources.k8s.client import Listed
from fimbria.sources.k8s.errors import AlreadyExists, Forbidden, NotFound
from fimbria.sources.k8s.types.meta import ObjectMeta

READY = {"conditions": [{"type": "Ready", "status": "True"}]}


def node(name: str, **spec: Any) -> Whole:
    return Whole(metadata=ObjectMeta(name=name), spec=spec, status=READY)


class Client:
    """Objects by (kind, name); pods become ready at once, and `word` comes of every connection."""

    def __init__(self, *nodes: str, word: str = "ok") -> None:
        self.objects: dict[tuple[str, str], Any] = {("nodes", n): node(n) for n in nodes}
        self.word = word
        self.created: list[str] = []
        self.refuse_once: Exception | None = None
        self.has_pods = asyncio.Event()

    async def create(self, resource: Any, value: Mapping[str, Any], namespace: str = "") -> None:
        if self.refuse_once is not None and resource.plural == "pods":
            error, self.refuse_once = self.refuse_once, None
            raise error
        key = resource.plural, value["metadata"]["name"]
        if key in self.objects:
            raise AlreadyExists("create", 409)
        self.created.append("/".join(key))
        metadata = ObjectMeta(name=key[1], labels=value["metadata"].get("labels"))
        if resource.plural == "pods":
            self.has_pods.set()
            self.objects[key] = Whole(metadata=metadata, spec=value["spec"], status=self._pod(value["spec"]))
        elif resource.plural == "services":
            self.objects[key] = Whole(metadata=metadata, spec={"clusterIPs": ["10.96.0.1", "fd00::1"]})
            labels = {"kubernetes.io/service-name": key[1]}
            self.objects["endpointslices", key[1]] = Slice(metadata=ObjectMeta(labels=labels), endpoints=({},))
        else:
            self.objects[key] = Whole(metadata=metadata)

    def _pod(self, spec: Mapping[str, Any]) -> dict[str, Any]:
        command = spec["containers"][0]["command"]
        words = [self.word] * len(json.loads(command[4])) if command[3] == "try" else []
        ended = {"state": {"terminated": {"exitCode": 0, "message": json.dumps(words)}}}
        return {
            "conditions": READY["conditions"],
            "podIPs": [{"ip": "10.0.0.1"}],
            "containerStatuses": [{"name": c["name"], **ended} for c in spec["containers"]],
        }

    async def get(self, resource: Any, name: str, namespace: str = "") -> Any:
        try:
            return self.objects[resource.plural, name]
        except KeyError:
            raise NotFound("get", 404) from None

    async def list(self, resource: Any, namespace: str = "", labels: str = "") -> Listed[Any]:
        if labels:
            return Listed((), "1")
        return Listed(tuple(o for (plural, _), o in self.objects.items() if plural == resource.plural), "1")

    async def delete(self, resource: Any, name: str, namespace: str = "", *, missing_ok: bool = False) -> None:
        assert resource is NAMESPACES
        self.objects = {k: o for k, o in self.objects.items() if k[0] in ("nodes",) or k == ("namespaces", "kept")}


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "SETTLE", 0.0)
    monkeypatch.setattr(subject, "POLL", 0.001)


async def run(client: Client, **settings: Any) -> subject.Finished:
    chosen: dict[str, Any] = {"namespace": "test", "image": "img", "timeout": 0.2} | settings
    return await subject.run(client, Settings(**chosen), lambda _: None)  # type: ignore[arg-type]


async def test_runs_on_two_nodes_and_removes_everything() -> None:
    client = Client("b", "a", "c")
    finished = await run(client)
    assert finished.nodes == ("a", "b")
    assert finished.results
    assert {k[0] for k in client.objects} == {"nodes"}
    # With an answer everywhere, exactly what should have been denied fails.
    assert [r.probe for r in finished.results if not r.passed] == [
        r.probe for r in finished.results if not r.probe.allowed
    ]


async def test_without_policies_none_are_created() -> None:
    client = Client("a", "b")
    finished = await run(client, policies=False)
    assert all(r.passed and r.under is None for r in finished.results)
    assert not [c for c in client.created if c.startswith("networkpolicies")]


async def test_nothing_of_the_nodes_where_that_is_forbidden() -> None:
    client = Client("a", "b")
    finished = await run(client, host=False)
    assert not [r for r in finished.results if r.probe.client == "host" or "host" in r.probe.target]
    assert not [c for c in client.created if "host" in c]


async def test_failures_are_explained_while_everything_is_there() -> None:
    client, seen = Client("a", "b", word="timeout"), []

    async def explain(results: Any, places: Any) -> Any:
        seen.append(("namespaces", "test") in client.objects)
        return [dataclasses.replace(r, hint=places.namespace) for r in results]

    settings = Settings(namespace="test", image="img", timeout=0.2)
    finished = await subject.run(client, settings, lambda _: None, explain)  # type: ignore[arg-type]
    assert seen == [True]
    assert {r.hint for r in finished.results} == {"test"}


async def test_one_node() -> None:
    finished = await run(Client("a"))
    assert finished.nodes == ("a",)
    assert not [r for r in finished.results if "other node" in r.probe.check]


async def test_kept() -> None:
    client = Client("a", "b")
    await run(client, keep=True)
    assert ("namespaces", "test") in client.objects


async def test_a_namespace_of_others_is_left_alone() -> None:
    client = Client("a", "b")
    client.objects["namespaces", "kept"] = Whole(metadata=ObjectMeta(name="kept"))
    client.objects["pods", "theirs"] = Whole(metadata=ObjectMeta(name="theirs"))
    with pytest.raises(CantRun, match="namespace kept exists already"):
        await run(client, namespace="kept")
    assert ("pods", "theirs") in client.objects


async def test_no_usable_node() -> None:
    client = Client()
    client.objects["nodes", "cordoned"] = node("cordoned", unschedulable=True)
    with pytest.raises(CantRun, match="no node is Ready for pods; there are cordoned"):
        await run(client)
    with pytest.raises(CantRun, match="there is no node x"):
        await run(client, nodes=("x",))
    assert client.created == []
    assert NODES.plural == "nodes"


async def test_removed_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client("a", "b")
    client.refuse_once = Forbidden("create pod", 403, text="quota exceeded")
    with pytest.raises(Forbidden, match="quota exceeded"):
        await run(client)
    assert ("namespaces", "test") not in client.objects


async def test_a_service_account_that_is_not_there_yet_is_waited_for() -> None:
    client = Client("a", "b")
    client.refuse_once = Forbidden("create pod", 403, text='serviceaccount "default" not found')
    assert (await run(client)).results


async def test_removed_when_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client("a", "b")
    monkeypatch.setattr(client, "_pod", lambda _spec: {"phase": "Pending"})
    task = asyncio.create_task(run(client, timeout=30.0))
    await client.has_pods.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ("namespaces", "test") not in client.objects


async def test_says_what_never_came(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client("a", "b")
    waiting = {"name": "server", "state": {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}}
    monkeypatch.setattr(client, "_pod", lambda _spec: {"phase": "Pending", "containerStatuses": [waiting]})
    with pytest.raises(CantRun, match=r"pod near: container server is waiting \(ErrImagePull: no such image\)"):
        await run(client)
    assert ("namespaces", "test") not in client.objects
