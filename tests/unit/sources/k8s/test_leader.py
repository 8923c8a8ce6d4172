"""Leader election in virtual time, over the real client, against a lease kept with the API server's rules."""

import asyncio
import heapq
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from yarl import URL

from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.config import ClusterConfig
from fimbria.sources.k8s.errors import ApiError, Unavailable, from_answer
from fimbria.sources.k8s.leader import LeaderElection, LeadershipLost


class World:
    """Virtual time, and the one lease with its resourceVersion."""

    def __init__(self) -> None:
        self.now = 0.0
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._count = 0

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self._count += 1
        future = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (self.now + seconds, self._count, future))
        await future

    async def pass_(self, seconds: float) -> None:
        end = self.now + seconds
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= end:
            at, _, future = heapq.heappop(self._sleepers)
            self.now = max(self.now, at)
            if not future.done():
                future.set_result(None)
            await self.settle()
        self.now = end

    @staticmethod
    async def settle() -> None:
        for _ in range(30):
            await asyncio.sleep(0)

    def refuse(self, what: str, code: int, reason: str) -> ApiError:
        return from_answer(what, code, json.dumps({"kind": "Status", "code": code, "reason": reason}).encode())

    def store(self, lease: dict[str, Any]) -> bytes:
        self.version += 1
        lease["metadata"]["resourceVersion"] = str(self.version)
        self.lease = lease
        return json.dumps(lease).encode()

    def serve(self, method: str, what: str, body: dict[str, Any]) -> bytes:
        if method == "POST":
            if self.lease is not None:
                raise self.refuse(what, 409, "AlreadyExists")
            return self.store(body)
        if self.lease is None:
            raise self.refuse(what, 404, "NotFound")
        if method == "GET":
            return json.dumps(self.lease).encode()
        if body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise self.refuse(what, 409, "Conflict")
        return self.store({"metadata": dict(self.lease["metadata"]), "spec": {**self.lease["spec"], **body["spec"]}})


class WorldClient(ApiClient):
    """The real client down to the single request; `reachable` cuts this candidate off."""

    def __init__(self, world: World) -> None:
        super().__init__(
            ClusterConfig("http://lease"), component="test", clock=world.clock, sleep=world.sleep, rate=1e9
        )
        self.world = world
        self.reachable = True

    async def _attempt(self, method: str, what: str, url: URL, body: bytes | None, content_type: str) -> bytes:
        await asyncio.sleep(0)
        if not self.reachable:
            raise Unavailable(what, 0, text="cut off")
        answer = self.world.serve(method, what, json.loads(body or b"{}"))
        await asyncio.sleep(0)
        return answer


class Candidate:
    def __init__(self, world: World, name: str) -> None:
        self.client = WorldClient(world)
        self.election = LeaderElection(
            self.client,
            namespace="kube-system",
            name="operator",
            identity=name,
            clock=world.clock,
            wall=lambda: 1.7e9 + world.now,
            sleep=world.sleep,
            random=lambda: 0.0,
        )
        self.events: list[str] = []
        self.finish = asyncio.Event()
        self.task = asyncio.create_task(self.election.run(self.lead))
        # Many candidates lose on purpose: their exceptions are looked at or not, but never reported by the collector.
        self.task.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def lead(self) -> None:
        self.events.append("began")
        try:
            await self.finish.wait()
            self.events.append("finished")
        except asyncio.CancelledError:
            self.events.append("cancelled")
            raise

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


@pytest.fixture
def world() -> World:
    return World()


async def test_first_one_leads_and_renews(world: World) -> None:
    a, b = Candidate(world, "a"), Candidate(world, "b")
    await world.pass_(60)
    assert a.election.holds()
    assert not b.election.holds()
    assert b.election.holder == "a"
    assert b.events == []
    assert world.lease is not None
    spec = world.lease["spec"]
    assert spec["holderIdentity"] == "a"
    assert (spec["leaseDurationSeconds"], spec.get("leaseTransitions", 0)) == (15, 0)
    assert spec["renewTime"] > spec["acquireTime"] == "2023-11-14T22:13:20.000000Z"
    await a.stop()
    await b.stop()


async def test_orderly_end_hands_over_at_once(world: World) -> None:
    a, b = Candidate(world, "a"), Candidate(world, "b")
    await world.pass_(5)
    a.finish.set()
    await a.task
    await world.pass_(2.1)
    assert a.events == ["began", "finished"]
    assert b.election.holds()
    assert world.lease is not None
    assert world.lease["spec"]["leaseTransitions"] == 1
    await b.stop()
    assert world.lease["spec"]["holderIdentity"] == ""


async def test_cut_off_leader_stops_before_the_next_one_begins(world: World) -> None:
    a, b = Candidate(world, "a"), Candidate(world, "b")
    await world.pass_(5)
    a.client.reachable = False
    await world.pass_(10.1)
    assert not a.election.holds()
    assert a.events == ["began", "cancelled"]
    assert isinstance(a.task.exception(), LeadershipLost)
    assert "could not renew the lease kube-system/operator for 10 s" in str(a.task.exception())
    assert b.events == []
    await world.pass_(10)
    assert b.election.holds()
    await b.stop()


async def test_stuck_process_knows_by_the_clock_alone(world: World) -> None:
    a = Candidate(world, "a")
    await world.pass_(5)
    assert a.election.holds()
    world.now += 60  # the loop didn't run
    assert not a.election.holds()
    await world.pass_(0)
    await world.settle()
    assert "the process was stopped for longer than that" in str(a.task.exception())
    assert a.events == ["began", "cancelled"]


async def test_taken_over_lease_is_noticed(world: World) -> None:
    a = Candidate(world, "a")
    await world.pass_(5)
    assert world.lease is not None
    world.store({**world.lease, "spec": {**world.lease["spec"], "holderIdentity": "intruder"}})
    await world.pass_(2)
    assert "held by intruder, not by a" in str(a.task.exception())
    assert world.lease["spec"]["holderIdentity"] == "intruder", "a lost lease isn't released"


async def test_edit_by_hand_is_no_loss(world: World) -> None:
    a = Candidate(world, "a")
    await world.pass_(5)
    assert world.lease is not None
    world.store({**world.lease, "metadata": {**world.lease["metadata"], "labels": {"x": "y"}}})
    await world.pass_(6)
    assert a.election.holds()
    assert world.lease["metadata"]["labels"] == {"x": "y"}
    await a.stop()


async def test_deleted_lease_ends_the_term(world: World) -> None:
    a = Candidate(world, "a")
    await world.pass_(5)
    world.lease = None
    await world.pass_(2)
    assert "was deleted" in str(a.task.exception())


async def test_foreign_clocks_do_not_matter(world: World) -> None:
    """A holder whose wall clock is years off is respected while its record changes, and replaced when it doesn't."""
    spec = {"holderIdentity": "other", "leaseDurationSeconds": 30, "renewTime": "1999-01-01T00:00:00.000000Z"}
    world.store({"metadata": {"name": "operator"}, "spec": spec})
    a = Candidate(world, "a")
    for _ in range(4):
        await world.pass_(20)
        assert a.events == []
        assert world.lease is not None
        world.store({**world.lease, "spec": {**spec, "renewTime": f"1999-01-01T00:00:{world.version:02}.000000Z"}})
    await world.pass_(29)
    assert a.events == [], "its own, longer duration counts"
    await world.pass_(5)
    assert a.election.holds()
    await a.stop()


async def test_error_of_the_work_is_the_callers(world: World) -> None:
    async def fail() -> None:
        raise KeyError("broken")

    election = LeaderElection(
        WorldClient(world), namespace="n", name="l", identity="a", clock=world.clock, sleep=world.sleep
    )
    with pytest.raises(KeyError, match="broken"):
        await election.run(fail)
    assert world.lease is not None
    assert world.lease["spec"]["holderIdentity"] == ""


@pytest.mark.parametrize("times", [(2, 2, 15), (2, 15, 15), (0, 10, 15), (12, 10, 15)])
def test_senseless_times_are_refused(world: World, times: tuple[int, int, int]) -> None:
    retry, within, duration = times
    with pytest.raises(ValueError, match="retry < renew_within < duration"):
        LeaderElection(
            WorldClient(world),
            namespace="n",
            name="l",
            identity="a",
            retry=retry,
            renew_within=within,
            duration=duration,
        )


STEPS = st.lists(st.tuples(st.sampled_from(["cut a", "cut b", "cut c", "heal", "wait", "stop"]), st.floats(0.1, 12)))


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_never_two_leaders(steps: list[tuple[str, float]]) -> None:
    async def play() -> None:
        world = World()
        candidates = {name: Candidate(world, name) for name in "abc"}
        for step, seconds in steps:
            if step == "heal":
                for candidate in candidates.values():
                    candidate.client.reachable = True
            elif step.startswith("cut"):
                candidates[step[-1]].client.reachable = False
            elif step == "stop":
                for name, candidate in candidates.items():
                    if candidate.task.done():
                        candidates[name] = Candidate(world, name)
            end = world.now + seconds
            while world.now < end:
                await world.pass_(min(0.5, end - world.now))
                assert sum(candidate.election.holds() for candidate in candidates.values()) <= 1
                working = [c for c in candidates.values() if c.events[-1:] == ["began"]]
                assert len(working) <= 1
        for candidate in candidates.values():
            candidate.client.reachable = True
            if candidate.task.done():
                candidates[candidate.election.identity] = Candidate(world, candidate.election.identity)
        await world.pass_(40)
        assert sum(candidate.election.holds() for candidate in candidates.values()) == 1, "somebody leads in the end"
        for candidate in candidates.values():
            await candidate.stop()

    asyncio.run(play())
