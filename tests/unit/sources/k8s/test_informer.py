"""The informer against a server that fails in every way the protocol knows."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted_api import Pauses, Scripted, Stream, answer, bookmark, event, fails, listing, pod, status, until

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.config import ClusterConfig, Token
from fimbria.sources.k8s.informer import KEEP, Informer, object_key
from fimbria.sources.k8s.resources import PODS
from fimbria.sources.k8s.types.core import Pod
from fimbria.tables.table import Table

Row = str
PodInformer = Informer[Pod, str, Row]


def node_of(obj: Pod) -> Row | None:
    if obj.spec.node_name == "explode":
        raise ValueError("no such node")
    return obj.spec.node_name or None


class Fixture:
    def __init__(self, api: Scripted, client: ApiClient, pauses: Pauses) -> None:
        self.api, self.client, self.pauses = api, client, pauses
        self.table = Table[str, Row]("pods")

    def make(self, **options: Any) -> PodInformer:
        defaults: dict[str, Any] = {"key": object_key, "sleep": self.pauses, "clock": self.pauses.clock}
        return Informer(self.client, PODS, self.table, node_of, **{**defaults, "random": lambda: 0.0, **options})

    @asynccontextmanager
    async def running(self, **options: Any) -> AsyncIterator[PodInformer]:
        informer = self.make(**options)
        task = asyncio.create_task(informer.run())
        try:
            yield informer
            assert not task.done(), task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    def rows(self) -> dict[str, Row]:
        return dict(self.table.items())

    async def shows(self, **rows: Row) -> None:
        wanted = {f"ns/{name}": node for name, node in rows.items()}
        try:
            await until(lambda: self.rows() == wanted)
        except TimeoutError:
            assert self.rows() == wanted

    def versions(self) -> list[str]:
        return [seen.query["resourceVersion"] for seen in self.api.requests("watch")]


@pytest.fixture
def fix(api: Scripted, client: ApiClient, pauses: Pauses) -> Fixture:
    return Fixture(api, client, pauses)


async def test_list_in_pages_then_watch_from_its_version(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 1)], 10, "more"), listing([pod("b", 2, "n2")], 10))
    stream = Stream().send(event("ADDED", pod("c", 11)), event("MODIFIED", pod("a", 12, "n9")))
    fix.api.on("watch", stream.send(event("DELETED", pod("b", 13, "n2"))))
    async with fix.running(labels="app=x", fields="spec.nodeName=n1", namespace="ns") as informer:
        await fix.shows(a="n9", c="n1")
        assert informer.connected
        assert informer.lag() == 0.0
        assert (informer.lists, informer.relists, informer.events) == (1, 0, 3)
    first, second = fix.api.requests("list")
    assert first.path == "/api/v1/namespaces/ns/pods"
    assert first.query == {"labelSelector": "app=x", "fieldSelector": "spec.nodeName=n1", "limit": "500"}
    assert second.query["continue"] == "more"
    (watch,) = fix.api.requests("watch")
    assert watch.query["resourceVersion"] == "10"
    assert watch.query["allowWatchBookmarks"] == "true"
    assert watch.query["labelSelector"] == "app=x"
    assert fix.table.synced


async def test_not_synced_before_the_last_page(fix: Fixture) -> None:
    gate = asyncio.Event()

    async def late(request: Any) -> Any:
        await gate.wait()
        return await listing([pod("b", 2)], 10)(request)

    fix.api.on("list", listing([pod("a", 1)], 10, "more"), late)
    async with fix.running():
        await until(lambda: len(fix.api.requests("list")) == 2)
        assert not fix.table.synced
        assert fix.rows() == {}
        gate.set()
        await fix.shows(a="n1", b="n1")


async def test_line_cut_by_disconnect_is_asked_for_again(fix: Fixture) -> None:
    fix.api.on("list", listing([], 10))
    whole = event("ADDED", pod("b", 12))
    fix.api.on("watch", Stream().send(event("ADDED", pod("a", 11)), whole[:40]).cut(), Stream().send(whole))
    async with fix.running() as informer:
        await fix.shows(a="n1", b="n1")
        assert informer.errors == 1
        assert informer.lists == 1
    assert fix.versions() == ["10", "11"]


async def test_events_cut_anywhere_are_put_together(fix: Fixture) -> None:
    fix.api.on("list", listing([], 10))
    data = b"".join(event("ADDED", pod(f"p{n}", 11 + n)) for n in range(5))
    stream = Stream()
    fix.api.on("watch", stream)
    async with fix.running():
        for at in range(0, len(data), 7):
            stream.send(data[at : at + 7])
        await fix.shows(p0="n1", p1="n1", p2="n1", p3="n1", p4="n1")


async def test_clean_end_goes_on_without_list_or_pause(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 1)], 10))
    first = Stream().send(event("ADDED", pod("b", 20)))
    fix.api.on("watch", first, Stream().send(event("ADDED", pod("c", 21))))
    async with fix.running() as informer:
        await fix.shows(a="n1", b="n1")
        fix.pauses.now += 300
        first.end()
        await fix.shows(a="n1", b="n1", c="n1")
        assert (informer.lists, informer.errors, fix.pauses.asked) == (1, 0, [])
    assert fix.versions() == ["10", "20"]


async def test_server_that_ends_every_watch_at_once_is_not_hammered(fix: Fixture) -> None:
    fix.api.on("list", listing([], 10)).on("watch", *(Stream().end() for _ in range(6)))
    async with fix.running() as informer:
        await until(lambda: len(fix.api.requests("watch")) == 7 and informer.connected)
        assert fix.pauses.asked == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2])


async def test_bookmark_moves_the_version_and_is_no_event(fix: Fixture) -> None:
    fix.api.on("list", listing([], 10)).on("watch", Stream().send(bookmark(99)).cut())
    async with fix.running() as informer:
        await until(lambda: len(fix.api.requests("watch")) == 2)
        assert informer.events == 0
    assert fix.versions() == ["10", "99"]


@pytest.mark.parametrize(
    "gone", [fails(410, "Expired", "too old"), Stream().send(event("ERROR", status(410, "Expired", "too old")))]
)
async def test_gone_lists_again_and_touches_only_what_differs(fix: Fixture, gone: Any) -> None:
    fix.api.on("list", listing([pod("a", 1), pod("b", 2), pod("c", 3)], 10))
    fix.api.on("watch", gone)
    gate = asyncio.Event()

    async def second(request: Any) -> Any:
        await gate.wait()
        return await listing([pod("a", 1), pod("b", 30, "n2"), pod("d", 31)], 40)(request)

    fix.api.on("list", second)
    async with fix.running() as informer:
        await until(lambda: len(fix.api.requests("list")) == 2)
        changes = fix.table.subscribe(initial=False)
        assert fix.rows() == {"ns/a": "n1", "ns/b": "n1", "ns/c": "n1"}, "old rows serve until the list is there"
        gate.set()
        await fix.shows(a="n1", b="n2", d="n1")
        assert changes.drain() == {"ns/b", "ns/c", "ns/d"}
        assert informer.relists == 1
        await until(lambda: informer.connected)
    assert fix.versions()[-1] == "40"


async def test_gone_between_pages_lists_in_one_piece(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 1)], 10, "more"), fails(410, "Expired"), listing([pod("b", 2)], 20))
    async with fix.running() as informer:
        await fix.shows(b="n1")
        assert informer.errors == 0
    assert "limit" not in fix.api.requests("list")[2].query
    assert "continue" not in fix.api.requests("list")[2].query


async def test_broken_list_keeps_old_rows(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 1), pod("b", 2)], 10)).on("watch", fails(410, "Gone"))
    fix.api.on("list", listing([pod("a", 1)], 20, "more"), fails(500, "InternalError", "boom"))
    fix.api.on("list", listing([pod("b", 2)], 30))
    async with fix.running() as informer:
        await fix.shows(b="n1")
        assert informer.errors == 2
        assert fix.table.revision == 3, "two rows came, one went; nothing was dropped and put back in between"


async def test_busy_server_is_given_the_time_it_asks_for(fix: Fixture) -> None:
    fix.api.on("list", fails(429, "TooManyRequests", Retry_After="7"), listing([pod("a", 1)], 10))
    async with fix.running() as informer:
        await fix.shows(a="n1")
        assert fix.pauses.asked == [7.0]
        assert informer.errors == 0


async def test_errors_wait_longer_each_time_and_are_named(fix: Fixture) -> None:
    fix.api.on("list", *(fails(500, "InternalError", "etcd is down") for _ in range(4)), listing([pod("a", 1)], 10))
    errors: list[str] = []
    started: list[PodInformer] = []

    async def sleep(seconds: float) -> None:
        errors.append(started[0].error)
        await fix.pauses(seconds)

    async with fix.running(sleep=sleep) as informer:
        started.append(informer)
        await until(lambda: informer.connected)
        assert informer.error == ""
    assert fix.pauses.asked == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert errors == ["list pods: 500 InternalError: etcd is down"] * 4


async def test_absent_server_leaves_the_table_serving(fix: Fixture) -> None:
    stream = Stream()
    fix.api.on("list", listing([pod("a", 1)], 10)).on("watch", stream, *(fails(503, "") for _ in range(3)))
    hold = asyncio.Event()

    async def sleep(seconds: float) -> None:
        fix.pauses.now += 60.0
        if len(fix.api.requests("watch")) >= 4:
            await hold.wait()

    async with fix.running(sleep=sleep) as informer:
        await until(lambda: informer.connected)
        stream.cut()
        await until(lambda: len(fix.api.requests("watch")) == 4 and not informer.connected)
        assert fix.rows() == {"ns/a": "n1"}
        assert fix.table.synced
        assert "watch pods: 503" in informer.error
        assert informer.lag() >= 60.0
        hold.set()
        await until(lambda: informer.connected)
        assert informer.lists == 1, "coming back needs no list"


async def test_a_server_that_comes_back_without_its_history_is_soon_listed(fix: Fixture) -> None:
    """As after a restart: the pause is not what ten minutes without an answer had made of it."""
    fix.api.on("list", listing([pod("a", 1)], 10), listing([pod("b", 2)], 20))
    fix.api.on("watch", *(fails(503, "") for _ in range(8)), fails(410, "Expired"))
    async with fix.running() as informer:
        await until(lambda: informer.lists == 2)
    assert fix.pauses.asked[7] > 10 > 1 > fix.pauses.asked[8], fix.pauses.asked


async def test_a_server_that_comes_back_and_refuses_everybody_first_is_soon_asked_again(fix: Fixture) -> None:
    """As one that hasn't read its roles yet."""
    fix.api.on("list", listing([pod("a", 1)], 10), listing([pod("b", 2)], 20))
    fix.api.on("watch", *(fails(503, "") for _ in range(8)), fails(403, "Forbidden"), fails(410, "Expired"))
    async with fix.running() as informer:
        await until(lambda: informer.lists == 2)
    assert fix.pauses.asked[7] > 10 > 1 > max(fix.pauses.asked[8:]), fix.pauses.asked


async def test_a_server_that_comes_and_goes_is_spared(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 1)], 10))
    fix.api.on("watch", *(fails(*how) for _ in range(4) for how in ((503, ""), (403, "Forbidden"))))
    async with fix.running() as informer:
        await until(lambda: informer.connected)
    assert fix.pauses.asked[5] > 3, fix.pauses.asked


async def test_object_of_the_wrong_shape_spoils_no_other(fix: Fixture) -> None:
    broken = {**pod("bad", 2), "spec": {"nodeName": 5}}
    fix.api.on("list", listing([pod("a", 1), broken, pod("b", 3)], 10))
    fix.api.on("watch", Stream().send(event("MODIFIED", {**pod("a", 11), "spec": []}) + event("ADDED", pod("c", 12))))
    async with fix.running() as informer:
        await fix.shows(a="n1", b="n1", c="n1")
        assert set(informer.bad) == {"ns/bad", "ns/a"}
        assert "$.spec.nodeName" in informer.bad["ns/bad"]
        assert informer.bad_total == 2
        assert informer.errors == 0


async def test_bad_object_recovers_or_goes(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 1, "explode"), {**pod("b", 2), "spec": 1}], 10))
    stream = Stream()
    fix.api.on("watch", stream)
    async with fix.running() as informer:
        await until(lambda: informer.connected)
        assert informer.bad["ns/a"] == "ValueError: no such node"
        stream.send(event("MODIFIED", pod("a", 11)), event("DELETED", {**pod("b", 12), "spec": 1}))
        await fix.shows(a="n1")
        await until(lambda: informer.bad == {})


@pytest.mark.parametrize(
    ("verdict", "left"), [(KEEP, {"ns/a": "n1"}), (None, {}), ("broken", {"ns/a": "broken", "ns/new": "broken"})]
)
async def test_callback_decides_about_the_row_of_a_bad_object(fix: Fixture, verdict: Any, left: dict[str, str]) -> None:
    fix.api.on("list", listing([pod("a", 1)], 10))
    fix.api.on(
        "watch",
        Stream().send(event("MODIFIED", pod("a", 11, "explode")), event("ADDED", {**pod("new", 12), "spec": 3})),
    )
    told: list[tuple[str, str, bytes]] = []

    def on_bad(key: str, error: str, raw: bytes) -> Any:
        told.append((key, error, raw))
        return verdict

    async with fix.running(on_bad=on_bad):
        await until(lambda: len(told) == 2)
        assert fix.rows() == left
    assert [key for key, _, _ in told] == ["ns/a", "ns/new"]
    assert all(b'"name"' in raw for _, _, raw in told)


async def test_bad_object_keeps_its_row_through_a_relist(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 1)], 10)).on("watch", fails(410, "Gone"))
    fix.api.on("list", listing([pod("a", 20, "explode")], 30))
    async with fix.running() as informer:
        await until(lambda: informer.relists == 1)
        assert fix.rows() == {"ns/a": "n1"}


async def test_transform_may_leave_objects_out(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 1), pod("b", 2, "")], 10))
    fix.api.on("watch", Stream().send(event("MODIFIED", pod("b", 11)), event("MODIFIED", pod("a", 12, ""))))
    async with fix.running():
        await fix.shows(b="n1")


async def test_nonsense_in_the_stream_is_an_error_of_the_stream(fix: Fixture) -> None:
    fix.api.on("list", listing([], 10)).on(
        "watch", Stream().send(b"<html>\n"), Stream().send(event("ADDED", pod("a", 11)))
    )
    async with fix.running() as informer:
        await fix.shows(a="n1")
        assert informer.errors == 1


async def test_nameless_object_is_counted_and_skipped(fix: Fixture) -> None:
    fix.api.on("list", listing([{"metadata": 5}, {"metadata": {}}, pod("a", 1)], 10))
    async with fix.running() as informer:
        await fix.shows(a="n1")
        assert informer.bad_total == 2


async def test_list_without_version_or_shape_is_refused(fix: Fixture) -> None:
    fix.api.on("list", answer({"items": []}), answer("hello"), listing([pod("a", 1)], 10))
    errors: set[str] = set()

    async def sleep(seconds: float) -> None:
        errors.add(informer.error)
        await asyncio.sleep(0)

    async with fix.running(sleep=sleep) as informer:
        await fix.shows(a="n1")
    assert any("no resourceVersion" in text for text in errors)
    assert any("no list" in text for text in errors)


async def test_server_with_another_history_is_listed_anew(fix: Fixture) -> None:
    """Its database was made anew: versions start again, and what we know means nothing there."""
    fix.api.on("list", listing([pod("old", 900)], 1000), listing([pod("new", 3)], 5))
    fix.api.on("watch", Stream().send(event("ADDED", pod("new", 3))))
    async with fix.running() as informer:
        await fix.shows(new="n1")
        assert informer.relists == 1
        await until(lambda: informer.connected)
    assert fix.versions() == ["1000", "5"]


async def test_deleted_object_with_its_old_version_is_no_other_history(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("a", 900), pod("b", 901)], 1000))
    fix.api.on("watch", Stream().send(event("DELETED", pod("a", 900))))
    async with fix.running() as informer:
        await fix.shows(b="n1")
        assert informer.lists == 1


async def test_version_refused_again_and_again_is_given_up(fix: Fixture) -> None:
    fix.api.on("list", listing([pod("old", 900)], 1000), listing([pod("new", 3)], 5))
    fix.api.on("watch", *(fails(504, "Timeout", "Too large resource version") for _ in range(3)))
    async with fix.running():
        await fix.shows(new="n1")
    assert fix.versions()[:3] == ["1000"] * 3


async def test_refused_token_is_read_again_for_a_watch(fix: Fixture, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    fix.client.config = ClusterConfig(fix.api.url, token=Token(path=path))

    async def rotate(request: Any) -> Any:
        path.write_text("new")
        return await fails(401, "Unauthorized")(request)

    fix.api.on("list", listing([], 10)).on("watch", rotate)
    async with fix.running() as informer:
        await until(lambda: informer.connected)
    assert [seen.headers["Authorization"] for seen in fix.api.requests("watch")] == ["Bearer old", "Bearer new"]


async def test_watch_times_are_spread(fix: Fixture) -> None:
    fix.api.on("list", listing([], 10))
    check: Callable[[], bool] = lambda: len(fix.api.requests("watch")) == 1  # noqa: E731
    async with fix.running(random=lambda: 0.5, watch_seconds=200):
        await until(check)
    assert fix.api.requests("watch")[0].query["timeoutSeconds"] == "250"


async def test_stream_that_brings_something_and_breaks_is_soon_opened_again(fix: Fixture) -> None:
    fix.api.on("list", listing([], 10))
    for version in range(11, 23):
        fix.api.on("watch", Stream().send(event("ADDED", pod(f"p{version}", version))).cut())
    async with fix.running(random=lambda: 1.0) as informer:
        await until(lambda: len(fix.table) == 12)
        assert max(fix.pauses.asked) <= 1.0
        assert informer.lists == 1
    assert sum(fix.pauses.asked) > 8.0, "nor is the server hammered"


async def test_a_large_list_is_not_asked_for_by_everybody_at_once(fix: Fixture) -> None:
    rows = [pod(f"p{n}", 1) for n in range(5000)]
    fix.api.on("list", listing(rows, 10), listing(rows, 20))
    fix.api.on("watch", fails(410, "Expired"))
    async with fix.running(random=lambda: 0.5) as informer:
        await until(lambda: informer.lists == 2)
    assert fix.pauses.asked == [pytest.approx(0.15 + 0.25)]
