"""ServiceCompute against a slow, obvious reference (service_reference.py), after every step of random histories."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import service_reference as ref
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fimbria.compute import service_frontends as front
from fimbria.compute.service import BACKENDS, FRONTENDS, HOST_PORT, REDIRECT, SLOTS, Delta, Extra, Owner, ServiceCompute
from fimbria.compute.service_frontends import Defaults
from fimbria.compute.service_rows import MAPS, no_rows
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix, is_v4, pack
from fimbria.model.rows import FrontendKey, SlotKey
from fimbria.model.selector import NodeSelector
from fimbria.model.service import (
    Endpoint,
    EndpointPort,
    EndpointSlice,
    NodeTopology,
    Service,
    ServiceKey,
    ServicePort,
)

# Small worlds, so that services meet on addresses and on endpoints.
KEYS = [ServiceKey("ns", name) for name in "abc"]
IPS = [pack(text) for text in ("10.96.0.1", "10.96.0.2", "fd96::1")]
OUTER = [pack(text) for text in ("203.0.113.1", "203.0.113.2", "2001:db8::1")]
RANGES = [Prefix.parse(text) for text in ("10.0.0.0/8", "192.0.2.1", "0.0.0.0/0", "fd00::/8", "::/0")]
PODS = {True: [pack(f"10.0.0.{n}") for n in range(5)], False: [pack(f"fd00::{n}") for n in range(3)]}
SELECTOR = NodeSelector.parse("pool=edge")
LABELS = [{}, {"topology.kubernetes.io/zone": "z1"}, {"topology.kubernetes.io/zone": "z2", "pool": "edge"}]
TOPOLOGIES = [NodeTopology(tuple(sorted(la.items())), addrs) for la in LABELS for addrs in ((), (OUTER[0],))]
OWNERS = [
    Owner(REDIRECT, "policy", "ns", "dns"),
    Owner(HOST_PORT, "pod", "ns", "p1"),
    Owner(HOST_PORT, "pod", "ns", "p2"),
]
DEFAULTS = [Defaults(), Defaults("hybrid"), Defaults("dsr", "maglev")]

names = st.sampled_from(["http", "http", "http", "dns"])
protos = st.sampled_from([6, 6, 6, 17])
often = st.sampled_from([True, True, True, False])
rarely = st.sampled_from([False, False, False, True])
ports = st.builds(ServicePort, names, st.sampled_from([80, 53]), protos, st.sampled_from([0, 30080, 30081]))
zones = st.sampled_from([(), ("z1",), ("z2",), ("z1", "z2")])


def some(values: list[Any], most: int = 2) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(st.sampled_from(values), max_size=most, unique=True).map(tuple)


def endpoints(v4: bool) -> st.SearchStrategy[Endpoint]:
    flag = st.booleans()
    where = st.sampled_from(["here", "there", ""])
    nodes = st.sampled_from([(), (), ("here",), ("there",)])
    return st.builds(Endpoint, st.sampled_from(PODS[v4]), where, often, flag, rarely, zones, nodes)


def slices(key: ServiceKey) -> st.SearchStrategy[tuple[EndpointSlice, ...]]:
    port = st.builds(EndpointPort, names, st.sampled_from([80, 8080]), protos)
    one = often.flatmap(
        lambda v4: st.builds(
            EndpointSlice,
            st.sampled_from(["s1", "s2", "s3"]),
            st.just(key),
            st.just(v4),
            st.lists(port, min_size=1, max_size=2, unique=True).map(tuple),
            st.lists(endpoints(v4), max_size=6).map(tuple),
            weight=st.sampled_from([100, 100, 100, 0, 50]),
        )
    )
    return st.lists(one, max_size=3, unique_by=lambda s: s.name).map(tuple)


def services(key: ServiceKey) -> st.SearchStrategy[Service]:
    return st.builds(
        Service,
        st.just(key),
        st.lists(st.sampled_from(IPS), min_size=1, max_size=2, unique=True).map(tuple),
        st.lists(ports, min_size=1, max_size=3).map(tuple),
        rarely,
        rarely,
        serves_cluster_ip=often,
        load_balancer_ips=some(OUTER),
        external_ips=some(OUTER, 1),
        external_local=st.booleans(),
        affinity_seconds=st.sampled_from([0, 0, 60, 10800]),
        source_ranges=some(RANGES),
        source_deny=rarely,
        algorithm=st.sampled_from(["", "random", "maglev"]),
        forwarding=st.sampled_from(["", "snat", "dsr"]),
        nodes=st.sampled_from([None, None, None, SELECTOR]),
    )


def extras(owner: Owner) -> st.SearchStrategy[tuple[Extra, ...]]:
    """Host ports, or redirects of what services have."""
    if owner.rank == HOST_PORT:
        keys = [FrontendKey(front.UNSPECIFIED[v4], port, 6) for v4 in (True, False) for port in (30080, 8080)]
    else:
        keys = [FrontendKey(addr, port, 6) for addr in IPS for port in (80, 53)]
    flags = front.HOST_PORT if owner.rank == HOST_PORT else front.EXEMPT

    def one(v4: bool) -> st.SearchStrategy[Extra]:
        mine = [key for key in keys if is_v4(key.addr) == v4]
        backends = some([(pod, 8080, 6) for pod in PODS[v4]])
        found = st.lists(st.sampled_from(mine), min_size=1, max_size=2, unique=True).map(tuple)
        return st.builds(Extra, found, backends, st.just(flags))

    return st.lists(often.flatmap(one), max_size=2).map(tuple)


def compute(defaults: Defaults = Defaults()) -> ServiceCompute:  # noqa: B008 frozen
    return ServiceCompute("here", Numbers("service ports"), Numbers("backends"), defaults)


def fill(target: ServiceCompute, world: Any, order: list[ServiceKey] | None = None) -> Delta:
    """Tell it everything, the winners of conflicts first unless another order is given."""
    delta = target.set_topology(world.node)
    for owner in sorted(o for o in world.extras if o.rank == REDIRECT):
        delta.merge(target.set_extra(owner, world.extras[owner]))
    order = order or sorted(world.services)
    target.announce(((key, world.services[key][0]) for key in order), delta)
    for key in order:
        delta.merge(target.update(key, *world.services[key]))
    for owner in sorted(o for o in world.extras if o.rank != REDIRECT):
        delta.merge(target.set_extra(owner, world.extras[owner]))
    return delta


class Run:
    """A world, the compute that follows it, and the kernel that its deltas are written to."""

    def __init__(self, defaults: Defaults = Defaults(), seed: int | None = None) -> None:  # noqa: B008 frozen
        self.world = ref.World(defaults=defaults)
        self.compute = compute(defaults)
        self.kernel: dict[str, dict[Any, Any]] = no_rows()
        self.chance = None if seed is None else random.Random(seed)

    def apply(self, change: Callable[[Any, ServiceCompute], Delta]) -> None:
        before = self.compute.all_rows()
        old = {f: self.compute.describe(f) for f in before[FRONTENDS]}
        delta = change(self.world, self.compute)
        after = self.compute.all_rows()
        self.write(delta)
        self.check()
        for frontend in before[FRONTENDS].keys() & after[FRONTENDS].keys():
            was, now = old[frontend], self.compute.describe(frontend)
            known = was and now and was.owner.rank not in (REDIRECT, HOST_PORT)
            if known and (was.owner, was.port.port, was.local) == (now.owner, now.port.port, now.local):
                assert before[FRONTENDS][frontend].service == after[FRONTENDS][frontend].service
        numbers = {backend: number for number, backend in after[BACKENDS].items()}
        for number, backend in before[BACKENDS].items():
            assert numbers.get(backend, number) == number
            assert after[BACKENDS].get(number, backend) == backend
        self.few_slots(delta, before, after)

    def few_slots(self, delta: Delta, before: dict[str, dict[Any, Any]], after: dict[str, dict[Any, Any]]) -> None:
        """What changes costs what changed: two slots for each backend that goes, one for each that comes."""
        was, now = by_number(before), by_number(after)
        cost = sum(
            2 * len(was.get(n, set()) - now.get(n, set())) + len(now.get(n, set()) - was.get(n, set()))
            for n in was.keys() | now.keys()
        )
        assert len(delta.upserts[SLOTS]) + len(delta.deletes[SLOTS]) <= cost

    def write(self, delta: Delta) -> None:
        for name, rows in delta.upserts.items():
            assert not delta.deletes[name] & rows.keys()
        if self.chance is None:
            for name in MAPS:
                self.kernel[name].update(delta.upserts[name])
                for key in delta.deletes[name]:
                    del self.kernel[name][key]
            return
        self.write_slowly(delta, self.chance)

    def write_slowly(self, delta: Delta, chance: random.Random) -> None:
        """As the apply loop does it, row by row: nothing half-written is ever seen."""
        old, new = sets_of(self.kernel), sets_of(self.compute.all_rows())
        for name in MAPS:
            for key in chance.sample(sorted(delta.upserts[name], key=repr), len(delta.upserts[name])):
                self.kernel[name][key] = delta.upserts[name][key]
                self.nothing_half(old, new)
        for name in reversed(MAPS):
            for key in chance.sample(sorted(delta.deletes[name], key=repr), len(delta.deletes[name])):
                del self.kernel[name][key]
                self.nothing_half(old, new)

    def nothing_half(self, old: dict[int, set[Any]], new: dict[int, set[Any]]) -> None:
        for row in self.kernel[FRONTENDS].values():
            slots = [self.kernel[SLOTS][SlotKey(row.service, slot)] for slot in range(row.count)]
            found = {self.kernel[BACKENDS][number] for number in slots}
            assert found <= old.get(row.service, set()) | new.get(row.service, set())
            if row.flags & front.TABLE:
                for number, _ in self.kernel["service_tables"][row.service].backends:
                    assert number in self.kernel[BACKENDS]

    def check(self) -> None:
        rows = self.compute.all_rows()
        assert self.kernel == rows
        leads, listed = ref.reference(self.world)
        ref.same(ref.resolve(rows), leads)
        found = [(b.addr, b.port, b.proto) for b in rows[BACKENDS].values()]
        assert len(found) == len(set(found))
        assert set(found) == listed

    def restart(self, seed: int) -> None:
        rows = self.compute.all_rows()
        self.compute = compute(self.world.defaults)
        self.compute.restore(rows[FRONTENDS], rows[SLOTS], rows[BACKENDS])
        order = sorted(self.world.services)
        claims = [f for key in order for f in ref.offers(self.world, key)]
        # Where several compete for a frontend, another order lets the loser have it for a moment.
        if len(set(claims)) == len(claims) and not self.world.extras:
            random.Random(seed).shuffle(order)
        delta = fill(self.compute, self.world, order)
        self.compute.settle()
        assert self.compute.all_rows() == rows
        assert not any(delta.deletes.values())
        assert delta.upserts == rows

    def another_order(self, seed: int) -> None:
        """Everything passes through another state first, and comes in another order."""
        chance = random.Random(seed)
        other, world = compute(self.world.defaults), self.world
        everything = (ServicePort("http", 80, 6, 30080),)
        for key in chance.sample(KEYS, len(KEYS)):
            other.update(key, Service(key, tuple(IPS), everything))
        steps = [partial(other.set_topology, world.node)]
        steps += [partial(other.update, key, *world.services.get(key, (None,))) for key in KEYS]
        steps += [partial(other.set_extra, owner, wanted) for owner, wanted in world.extras.items()]
        for step in chance.sample(steps, len(steps)):
            step()
        ref.same(ref.resolve(other.all_rows()), ref.reference(world)[0])


def by_number(rows: dict[str, dict[Any, Any]]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    for key, backend in rows[SLOTS].items():
        found.setdefault(key.service, set()).add(backend)
    return found


def sets_of(rows: dict[str, dict[Any, Any]]) -> dict[int, set[Any]]:
    return {number: {rows[BACKENDS][b] for b in found} for number, found in by_number(rows).items()}


def put(key: ServiceKey, state: Any) -> Callable[[Any, ServiceCompute], Delta]:
    def change(world: Any, target: ServiceCompute) -> Delta:
        if state is None:
            world.services.pop(key, None)
            return target.update(key, None)
        world.services[key] = state
        return target.update(key, *state)

    return change


def claim(owner: Owner, wanted: tuple[Extra, ...]) -> Callable[[Any, ServiceCompute], Delta]:
    def change(world: Any, target: ServiceCompute) -> Delta:
        world.extras.pop(owner, None)
        if wanted:
            world.extras[owner] = wanted
        return target.set_extra(owner, wanted)

    return change


def move(node: NodeTopology) -> Callable[[Any, ServiceCompute], Delta]:
    def change(world: Any, target: ServiceCompute) -> Delta:
        world.node = node
        return target.set_topology(node)

    return change


class ServiceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.run = Run()

    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def replace(self, data: st.DataObject, key: ServiceKey) -> None:
        self.run.apply(put(key, (data.draw(services(key)), data.draw(slices(key)))))

    @precondition(lambda self: self.run.world.services)
    @rule(data=st.data())
    def change_slices(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.run.world.services)))
        service, parts = self.run.world.services[key]
        fresh = {s.name: s for s in data.draw(slices(key))}
        kept = [s for s in parts if s.name not in fresh and data.draw(st.booleans())]
        self.run.apply(put(key, (service, (*kept, *fresh.values()))))

    @precondition(lambda self: self.run.world.services)
    @rule(data=st.data())
    def change_service(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.run.world.services)))
        self.run.apply(put(key, (data.draw(services(key)), self.run.world.services[key][1])))

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: ServiceKey) -> None:
        self.run.apply(put(key, None))

    @rule(node=st.sampled_from(TOPOLOGIES))
    def node_changes(self, node: NodeTopology) -> None:
        self.run.apply(move(node))

    @rule(data=st.data(), owner=st.sampled_from(OWNERS))
    def others_claim(self, data: st.DataObject, owner: Owner) -> None:
        self.run.apply(claim(owner, data.draw(extras(owner))))

    @precondition(lambda self: self.run.world.services)
    @rule(data=st.data())
    def nothing_new(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.run.world.services)))
        assert not self.run.compute.update(key, *self.run.world.services[key])

    @rule(seed=st.integers(0, 1000))
    def restart(self, seed: int) -> None:
        self.run.restart(seed)

    @rule(seed=st.integers(0, 1000))
    def another_order_ends_the_same(self, seed: int) -> None:
        self.run.another_order(seed)

    @invariant()
    def rows_are_right(self) -> None:
        self.run.check()


ServiceMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestServiceMachine = ServiceMachine.TestCase


def dense(chance: random.Random, key: ServiceKey, previous: Any) -> Any:
    """Mostly one slice differs from before, and most endpoints match: histories that hypothesis rarely draws."""
    service = previous[0] if previous and chance.random() > 0.15 else dense_service(chance, key)
    parts = {s.name: s for s in previous[1]} if previous else {}
    name = chance.choice(["s1", "s2", "s3"])
    if chance.random() < 0.15:
        parts.pop(name, None)
    else:
        parts[name] = dense_slice(chance, key, name)
    return service, tuple(parts.values())


def dense_service(chance: random.Random, key: ServiceKey) -> Service:
    offered = tuple(
        ServicePort("http", chance.choice([80, 81]), 6, chance.choice([0, 30080, 30081]))
        for _ in range(chance.randint(1, 2))
    )
    return Service(
        key,
        tuple(chance.sample(IPS, chance.randint(1, 3))),
        offered,
        chance.random() < 0.2,
        chance.random() < 0.1,
        load_balancer_ips=tuple(chance.sample(OUTER, chance.randint(0, 2))),
        external_ips=tuple(chance.sample(OUTER, chance.randint(0, 1))),
        external_local=chance.random() < 0.4,
        affinity_seconds=chance.choice([0, 0, 60]),
        source_ranges=tuple(chance.sample(RANGES[:2], chance.randint(0, 2))),
        algorithm=chance.choice(["", "", "maglev"]),
    )


def dense_slice(chance: random.Random, key: ServiceKey, name: str) -> EndpointSlice:
    v4 = name != "s3"
    share = chance.choice([0, 0.5, 1])
    hinted = chance.choice([0, 0.5, 1, 1])
    found = []
    for pod in chance.sample(PODS[v4], chance.randint(0, len(PODS[v4]))):
        ready = chance.random() < share
        serving = ready or chance.random() < 0.5
        terminating = not ready and chance.random() < 0.5
        zone = (chance.choice(["z1", "z2"]),) if chance.random() < hinted else ()
        node = (chance.choice(["here", "there"]),) if chance.random() < hinted - 0.5 else ()
        found.append(Endpoint(pod, chance.choice(["here", "there"]), ready, serving, terminating, zone, node))
    weight = chance.choice([100] * 8 + [0, 50])
    return EndpointSlice(name, key, v4, (EndpointPort("http", 8080, 6),), tuple(found), weight=weight)


def dense_extras(chance: random.Random, owner: Owner) -> tuple[Extra, ...]:
    v4 = chance.random() < 0.7
    if owner.rank == HOST_PORT:
        key = FrontendKey(front.UNSPECIFIED[v4], chance.choice([30080, 8080]), 6)
    else:
        key = FrontendKey(IPS[0] if v4 else IPS[2], 80, 6)
    backends = tuple((pod, 8080, 6) for pod in chance.sample(PODS[v4], chance.randint(0, 2)))
    return () if chance.random() < 0.3 else (Extra((key,), backends, front.HOST_PORT),)


@pytest.mark.parametrize("seed", range(15))
def test_long_dense_histories(seed: int) -> None:
    chance = random.Random(seed)
    run = Run(DEFAULTS[seed % 3], seed)
    for step in range(200):
        dice = chance.random()
        if dice < 0.1:
            run.apply(move(chance.choice(TOPOLOGIES)))
        elif dice < 0.2:
            owner = chance.choice(OWNERS)
            run.apply(claim(owner, dense_extras(chance, owner)))
        else:
            key = chance.choice(KEYS)
            gone = chance.random() < 0.05
            run.apply(put(key, None if gone else dense(chance, key, run.world.services.get(key))))
        if step % 20 == 19:
            run.restart(step)
            run.another_order(step)
