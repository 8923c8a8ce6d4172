"""Events: counted, bounded, best effort."""

import pytest
from scripted_api import Pauses, Scripted, answer, fails

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.events import EventRecorder
from fimbria.sources.k8s.resources import CILIUM_NODES, PODS
from fimbria.sources.k8s.types.meta import ObjectMeta

POD = ObjectMeta(name="web", namespace="shop", uid="u1", resource_version="5")
OK = answer({"metadata": {"name": "x"}}, 201)


@pytest.fixture
def recorder(client: ApiClient, pauses: Pauses) -> EventRecorder:
    return EventRecorder(
        client, component="fimbria-agent", host="n1", burst=3, wall=lambda: 1.7e9 + pauses.now, clock=pauses.clock
    )


async def test_one_event_in_full(api: Scripted, recorder: EventRecorder) -> None:
    api.on("post", OK)
    recorder.emit(PODS, POD, "Warning", "PolicyInvalid", "no such port")
    await recorder.flush()
    (seen,) = api.seen
    assert seen.path == "/api/v1/namespaces/shop/events"
    body = seen.json
    assert body["involvedObject"] == {
        "apiVersion": "v1",
        "kind": "Pod",
        "namespace": "shop",
        "name": "web",
        "uid": "u1",
        "resourceVersion": "5",
    }
    assert (body["type"], body["reason"], body["message"], body["count"]) == (
        "Warning",
        "PolicyInvalid",
        "no such port",
        1,
    )
    assert body["firstTimestamp"] == body["lastTimestamp"] == "2023-11-14T22:30:00Z"
    assert body["source"] == {"component": "fimbria-agent", "host": "n1"}
    assert body["metadata"]["name"].startswith("web.")


async def test_repetition_counts_up_in_the_same_event(api: Scripted, recorder: EventRecorder, pauses: Pauses) -> None:
    api.on("post", OK).on("patch", OK)
    recorder.emit(PODS, POD, "Normal", "Ready", "yes")
    await recorder.flush()
    pauses.now += 90
    for _ in range(5):
        recorder.emit(PODS, POD, "Normal", "Ready", "yes")
    await recorder.flush()
    post, patch = api.seen
    assert patch.path == f"/api/v1/namespaces/shop/events/{post.json['metadata']['name']}"
    assert patch.json == {"count": 6, "lastTimestamp": "2023-11-14T22:31:30Z", "message": "yes"}
    assert recorder.posted == 2


async def test_expired_event_is_told_anew(api: Scripted, recorder: EventRecorder, pauses: Pauses) -> None:
    api.on("post", OK, OK).on("patch", fails(404, "NotFound"))
    for _ in range(2):
        recorder.emit(PODS, POD, "Normal", "Ready", "yes")
        await recorder.flush()
        pauses.now += 1
    first, _, second = api.seen
    assert second.json["count"] == 2
    assert second.json["metadata"]["name"] != first.json["metadata"]["name"]


async def test_flood_about_one_object_is_bounded_and_spares_others(api: Scripted, recorder: EventRecorder) -> None:
    api.on("post", *(OK for _ in range(4)))
    for n in range(50):
        recorder.emit(PODS, POD, "Warning", "Noise", f"number {n}")
    recorder.emit(CILIUM_NODES, ObjectMeta(name="n1"), "Normal", "Quiet", "hello")
    await recorder.flush()
    assert len(api.seen) == 4
    assert recorder.suppressed == 47
    assert api.seen[-1].path == "/api/v1/namespaces/default/events", "events about cluster-scoped objects"
    assert api.seen[-1].json["involvedObject"]["apiVersion"] == "cilium.io/v2"


async def test_failure_costs_one_event(api: Scripted, recorder: EventRecorder) -> None:
    api.on("post", fails(403, "Forbidden"), OK)
    recorder.emit(PODS, POD, "Normal", "A", "a")
    recorder.emit(PODS, POD, "Normal", "B", "b")
    await recorder.flush()
    assert (recorder.failed, recorder.posted) == (1, 1)


async def test_long_messages_are_cut_between_characters(api: Scripted, recorder: EventRecorder) -> None:
    api.on("post", OK)
    recorder.emit(PODS, POD, "Normal", "Long", "x" + "ä" * 1000)
    await recorder.flush()
    assert len(api.seen[0].json["message"].encode()) == 1023


async def test_memory_is_bounded(client: ApiClient) -> None:
    recorder = EventRecorder(client, component="c", remember=10)
    for n in range(1000):
        recorder.emit(PODS, ObjectMeta(name=f"p{n}", namespace="ns"), "Normal", "R", "m")
    assert max(len(recorder._stories), len(recorder._buckets), len(recorder._todo)) <= 10
    assert recorder.suppressed == 990
