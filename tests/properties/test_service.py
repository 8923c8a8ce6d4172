"""ServiceCompute against a slow, obvious reference, after every step of random histories."""

import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from fimbria.compute.service import BACKENDS, FRONTENDS, SLOTS, BackendKey, Delta, ServiceCompute
from fimbria.decide.numbers import Numbers
from fimbria.model.address import is_v4, pack
from fimbria.model.rows import FrontendKey, SlotKey
from fimbria.model.service import Endpoint, EndpointPort, EndpointSlice, Service, ServiceKey, ServicePort

State = tuple[Service, tuple[EndpointSlice, ...]]
Resolved = dict[FrontendKey, frozenset[BackendKey]]

# Small worlds, so that services meet on cluster IPs and on endpoints.
KEYS = [ServiceKey("ns", name) for name in "abc"]
IPS = [pack(text) for text in ("10.96.0.1", "10.96.0.2", "fd96::1")]
PODS = {True: [pack(f"10.0.0.{n}") for n in range(5)], False: [pack(f"fd00::{n}") for n in range(3)]}

names = st.sampled_from(["http", "http", "http", "dns"])
protos = st.sampled_from([6, 6, 6, 17])
ports = st.builds(ServicePort, names, st.sampled_from([80, 53]), protos)


def endpoints(v4: bool) -> st.SearchStrategy[Endpoint]:
    flag = st.booleans()
    return st.builds(Endpoint, st.sampled_from(PODS[v4]), st.sampled_from(["here", "there", ""]), flag, flag, flag)


def slices(key: ServiceKey) -> st.SearchStrategy[tuple[EndpointSlice, ...]]:
    port = st.builds(EndpointPort, names, st.sampled_from([80, 8080]), protos)
    one = st.sampled_from([True, True, False]).flatmap(
        lambda v4: st.builds(
            EndpointSlice,
            st.sampled_from(["s1", "s2", "s3"]),
            st.just(key),
            st.just(v4),
            st.lists(port, min_size=1, max_size=2, unique=True).map(tuple),
            st.lists(endpoints(v4), max_size=6).map(tuple),
        )
    )
    return st.lists(one, max_size=3, unique_by=lambda s: s.name).map(tuple)


def services(key: ServiceKey) -> st.SearchStrategy[Service]:
    ips = st.lists(st.sampled_from(IPS), min_size=1, max_size=2, unique=True).map(tuple)
    offered = st.lists(ports, min_size=1, max_size=3).map(tuple)
    rarely = st.sampled_from([False, False, False, True])
    return st.builds(Service, st.just(key), ips, offered, rarely, rarely)


def members(state: State, frontend: FrontendKey, port: ServicePort, here: str) -> dict[BackendKey, list[Endpoint]]:
    service, parts = state
    found: dict[BackendKey, list[Endpoint]] = {}
    for part in parts:
        for target in part.ports:
            for endpoint in part.endpoints:
                if part.v4 != is_v4(frontend.addr) or (target.name, target.proto) != (port.name, port.proto):
                    continue
                if service.internal_local and endpoint.node != here:
                    continue
                found.setdefault((endpoint.addr, target.port, port.proto), []).append(endpoint)
    return found


def reference(states: dict[ServiceKey, State]) -> tuple[Resolved, set[BackendKey]]:
    """What each frontend leads to, and all backends that there are."""
    resolved: Resolved = {}
    listed: set[BackendKey] = set()
    for key in sorted(states):
        service, _ = states[key]
        for addr in service.cluster_ips:
            for port in service.ports:
                frontend = FrontendKey(addr, port.port, port.proto)
                if frontend in resolved:
                    continue
                found = members(states[key], frontend, port, "here")
                listed |= found.keys()
                ready = {b for b, es in found.items() if any(e.ready or service.publish_not_ready for e in es)}
                last = {b for b, es in found.items() if any(e.serving and e.terminating for e in es)}
                resolved[frontend] = frozenset(ready or last)
    return resolved, listed


def resolve(rows: dict[str, dict[Any, Any]]) -> Resolved:
    """What the datapath makes of the rows. Fails on a slot or backend that is missing, double or nobody's."""
    resolved: Resolved = {}
    used: set[SlotKey] = set()
    for frontend, row in rows[FRONTENDS].items():
        keys = [SlotKey(row.service, slot) for slot in range(row.count)]
        assert not used & set(keys)
        used |= set(keys)
        found = [rows[BACKENDS][rows[SLOTS][key]] for key in keys]
        resolved[frontend] = frozenset((b.addr, b.port, b.proto) for b in found)
        assert len(resolved[frontend]) == len(found)
        assert all(b.proto == frontend.proto and is_v4(b.addr) == is_v4(frontend.addr) for b in found)
    assert used == rows[SLOTS].keys()
    return resolved


def addresses(service: Service) -> set[FrontendKey]:
    return {FrontendKey(ip, port.port, port.proto) for ip in service.cluster_ips for port in service.ports}


def compute() -> ServiceCompute:
    return ServiceCompute("here", Numbers("service ports"), Numbers("backends"))


def fill(target: ServiceCompute, states: Iterable[tuple[ServiceKey, State]]) -> None:
    for key, (service, parts) in states:
        target.update(key, service, parts)


class ServiceMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.compute = compute()
        self.states: dict[ServiceKey, State] = {}
        self.kernel: dict[str, dict[Any, Any]] = {BACKENDS: {}, SLOTS: {}, FRONTENDS: {}}

    def apply(self, key: ServiceKey, state: State | None) -> None:
        before, old_rows = reference(self.states)[0], self.compute.all_rows()
        if state is None:
            self.states.pop(key, None)
            delta = self.compute.update(key, None)
        else:
            self.states[key] = state
            delta = self.compute.update(key, *state)
        self.write(delta)
        after, rows = reference(self.states)[0], self.compute.all_rows()
        self.numbers_are_stable(old_rows, rows)
        changes = sum(2 * len(before.get(f, set()) - now) + len(now - before.get(f, set())) for f, now in after.items())
        removed = sum(len(was) for f, was in before.items() if f not in after)
        assert len(delta.upserts[SLOTS]) + len(delta.deletes[SLOTS]) <= changes + removed

    def write(self, delta: Delta) -> None:
        for name, rows in delta.upserts.items():
            assert not delta.deletes[name] & rows.keys()
            self.kernel[name].update(rows)
        for name, keys in delta.deletes.items():
            for row_key in keys:
                del self.kernel[name][row_key]

    def numbers_are_stable(self, before: dict[str, dict[Any, Any]], after: dict[str, dict[Any, Any]]) -> None:
        for frontend in before[FRONTENDS].keys() & after[FRONTENDS].keys():
            assert before[FRONTENDS][frontend].service == after[FRONTENDS][frontend].service
        numbers = {backend: number for number, backend in after[BACKENDS].items()}
        for number, backend in before[BACKENDS].items():
            assert numbers.get(backend, number) == number
            assert after[BACKENDS].get(number, backend) == backend

    @rule(data=st.data(), key=st.sampled_from(KEYS))
    def replace(self, data: st.DataObject, key: ServiceKey) -> None:
        self.apply(key, (data.draw(services(key)), data.draw(slices(key))))

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def change_slices(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.states)))
        service, parts = self.states[key]
        fresh = {s.name: s for s in data.draw(slices(key))}
        kept = [s for s in parts if s.name not in fresh and data.draw(st.booleans())]
        self.apply(key, (service, (*kept, *fresh.values())))

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def change_service(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.states)))
        self.apply(key, (data.draw(services(key)), self.states[key][1]))

    @rule(key=st.sampled_from(KEYS))
    def delete(self, key: ServiceKey) -> None:
        self.apply(key, None)

    @precondition(lambda self: self.states)
    @rule(data=st.data())
    def nothing_new(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.states)))
        assert not self.compute.update(key, *self.states[key])

    @rule(seed=st.integers(0, 1000))
    def restart(self, seed: int) -> None:
        self.check_restart(seed)

    def check_restart(self, seed: int) -> None:
        rows = self.compute.all_rows()
        self.compute = compute()
        self.compute.restore(rows[FRONTENDS], rows[SLOTS], rows[BACKENDS])
        states = sorted(self.states.items(), key=lambda item: item[0])
        frontends = [f for service, _ in self.states.values() for f in addresses(service)]
        # Where services compete for a frontend, another order lets the loser have it for a moment.
        if len(set(frontends)) == len(frontends):
            random.Random(seed).shuffle(states)
        delta = Delta()
        for key, state in states:
            delta.merge(self.compute.update(key, *state))
        self.compute.settle()
        assert self.compute.all_rows() == rows
        assert not any(delta.deletes.values())
        assert delta.upserts == rows

    @invariant()
    def rows_are_right(self) -> None:
        rows = self.compute.all_rows()
        resolved, listed = reference(self.states)
        assert resolve(rows) == resolved
        found = [(b.addr, b.port, b.proto) for b in rows[BACKENDS].values()]
        assert len(found) == len(set(found))
        assert set(found) == listed
        assert self.kernel == rows

    @rule(seed=st.integers(0, 1000))
    def another_order_ends_the_same(self, seed: int) -> None:
        self.check_another_order(seed)

    def check_another_order(self, seed: int) -> None:
        states = list(self.states.items())
        chance = random.Random(seed)
        chance.shuffle(states)
        other = compute()
        # Everything passes through another state first.
        fill(other, [(key, (service, ())) for key, (service, _) in states])
        other.update(KEYS[chance.randrange(3)], Service(KEYS[0], tuple(IPS), (ServicePort("http", 80, 6),)))
        for key in KEYS:
            if key not in self.states:
                other.update(key, None)
        chance.shuffle(states)
        fill(other, states)
        assert resolve(other.all_rows()) == resolve(self.compute.all_rows())


ServiceMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)
TestServiceMachine = ServiceMachine.TestCase


def dense(chance: random.Random, key: ServiceKey, previous: State | None) -> State:
    """Mostly one slice differs from before, and most endpoints match: histories that hypothesis rarely draws."""
    if previous is None or chance.random() < 0.1:
        ips = tuple(chance.sample(IPS, chance.randint(1, 3)))
        offered = tuple(ServicePort("http", chance.choice([80, 81]), 6) for _ in range(chance.randint(1, 2)))
        service = Service(key, ips, offered, chance.random() < 0.2, chance.random() < 0.1)
    else:
        service = previous[0]
    parts = {s.name: s for s in previous[1]} if previous else {}
    name = chance.choice(["s1", "s2", "s3"])
    if chance.random() < 0.15:
        parts.pop(name, None)
    else:
        v4 = name != "s3"
        pods = chance.sample(PODS[v4], chance.randint(0, len(PODS[v4])))
        share = chance.choice([0, 0.5, 1])
        found = []
        for pod in pods:
            ready = chance.random() < share
            serving = ready or chance.random() < 0.5
            terminating = not ready and chance.random() < 0.5
            found.append(Endpoint(pod, chance.choice(["here", "there"]), ready, serving, terminating))
        parts[name] = EndpointSlice(name, key, v4, (EndpointPort("http", 8080, 6),), tuple(found))
    return service, tuple(parts.values())


@pytest.mark.parametrize("seed", range(15))
def test_long_dense_histories(seed: int) -> None:
    chance = random.Random(seed)
    machine = ServiceMachine()
    for step in range(200):
        key = chance.choice(KEYS)
        gone = chance.random() < 0.05
        machine.apply(key, None if gone else dense(chance, key, machine.states.get(key)))
        machine.rows_are_right()
        if step % 20 == 19:
            machine.check_restart(step)
            machine.check_another_order(step)
