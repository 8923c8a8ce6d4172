"""Services: rows of `frontends`, `service_slots` and `backends`.

Rules
1. A frontend (cluster IP, port, protocol) leads to the ready endpoints of its service; if there are none, to those that
   still serve while terminating; if there are none either, it stays and refuses.
2. Every endpoint that a slice lists keeps its backend row, ready or not: connections that chose it go on. One that no
   slice lists any more has none. A backend that several frontends lead to is one row.
3. Slots are dense, and stable: a backend that goes is replaced by a new one, or else by the last. Which backend is in
   which slot therefore depends on what came before, so it is restored, like the numbers.
4. A frontend that several services claim belongs to the first of them by name; the others wait for it, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.decide.numbers import Numbers
from fimbria.model.address import is_v4, unpack
from fimbria.model.rows import Backend, Frontend, FrontendKey, SlotKey
from fimbria.model.service import EndpointSlice, Service, ServiceKey, ServicePort

BACKENDS: Final = "backends"
SLOTS: Final = "service_slots"
FRONTENDS: Final = "frontends"
FRONTEND_CLUSTER_IP: Final = 1

BackendKey = tuple[bytes, int, int]  # address, port, protocol
Presence = tuple[int, int, int]  # in how many slices: listed, ready, serving while terminating

_LISTED: Final[Presence] = (1, 0, 0)
_READY: Final[Presence] = (1, 1, 0)
_TERMINATING: Final[Presence] = (1, 0, 1)
_ABSENT: Final[Presence] = (0, 0, 0)


def _three_maps() -> dict[str, dict[Any, Any]]:
    return {BACKENDS: {}, SLOTS: {}, FRONTENDS: {}}


def _three_sets() -> dict[str, set[Any]]:
    return {BACKENDS: set(), SLOTS: set(), FRONTENDS: set()}


@dataclass(slots=True)
class Delta:
    """Changed rows by map name. No key is both in `upserts` and in `deletes` of a map."""

    upserts: dict[str, dict[Any, Any]] = field(default_factory=_three_maps)
    deletes: dict[str, set[Any]] = field(default_factory=_three_sets)

    def __bool__(self) -> bool:
        return any(self.upserts.values()) or any(self.deletes.values())

    def __len__(self) -> int:
        return sum(map(len, self.upserts.values())) + sum(map(len, self.deletes.values()))

    def put(self, name: str, key: Any, row: Any) -> None:
        """Want a row."""
        self.upserts[name][key] = row
        self.deletes[name].discard(key)

    def drop(self, name: str, key: Any) -> None:
        """Want none."""
        self.deletes[name].add(key)
        self.upserts[name].pop(key, None)

    def merge(self, later: Delta) -> None:
        """Add what changed after this."""
        for name, rows in later.upserts.items():
            self.upserts[name].update(rows)
            self.deletes[name] -= rows.keys()
        for name, keys in later.deletes.items():
            self.deletes[name] |= keys
            for key in keys:
                self.upserts[name].pop(key, None)


class _Target:
    """What one frontend leads to: its members with their presence, and the slots that `order` names by position."""

    __slots__ = ("index", "members", "number", "order", "ready", "row", "served_ready")

    def __init__(self, number: int, order: Iterable[BackendKey]) -> None:
        self.number = number
        self.members: dict[BackendKey, Presence] = {}
        self.ready = 0  # members that are ready
        self.served_ready = False  # the slots are filled with ready members, not with terminating ones
        self.order = list(dict.fromkeys(order))
        self.index = {backend: slot for slot, backend in enumerate(self.order)}
        self.row: Frontend | None = None

    def wants(self, backend: BackendKey) -> bool:
        presence = self.members.get(backend, _ABSENT)
        return (presence[1] if self.ready else presence[2]) > 0

    def set_members(self, members: dict[BackendKey, Presence]) -> None:
        self.members = members
        self.ready = sum(1 for presence in members.values() if presence[1])


@dataclass(slots=True)
class _State:
    service: Service
    slices: dict[str, EndpointSlice]
    ports: dict[FrontendKey, ServicePort]


_NO_STATE: Final = _State(Service(ServiceKey("", "")), {}, {})


class ServiceCompute:
    """Incremental by service: `update` returns what changed, `all_rows` the whole; both always agree."""

    def __init__(self, node: str, services: Numbers[FrontendKey], backends: Numbers[BackendKey]) -> None:
        """`node` is this node's name, as endpoints state it."""
        self.node = node
        self.services = services
        self.backends = backends
        self._states: dict[ServiceKey, _State] = {}
        self._claims: dict[FrontendKey, tuple[ServiceKey, ...]] = {}
        self._targets: dict[FrontendKey, _Target] = {}
        self._users: dict[BackendKey, int] = {}
        self._unlisted: set[BackendKey] = set()
        self._restored: dict[int, list[BackendKey]] = {}
        self._presences: dict[Presence, Presence] = {}

    # --- decided state -------------------------------------------------------------------------------------------

    def restore(
        self,
        frontends: Mapping[FrontendKey, Frontend],
        slots: Mapping[SlotKey, int],
        backends: Mapping[int, Backend],
        spent_backends: Iterable[int] = (),
    ) -> None:
        """Take over numbers and slots from rows read back from the kernel, before the first `update`.

        `spent_backends`: ids that connections may still name. Rows that contradict each other are left out, and with
        that written anew. Raises ValueError after the first `update`.
        """
        self.services.restore((key, row.service) for key, row in frontends.items())
        rows = (((row.addr, row.port, row.proto), number) for number, row in backends.items())
        self.backends.restore(rows, spent_backends)
        for slot in sorted(slots, key=lambda s: (s.service, s.slot)):
            backend = self.backends.key(slots[slot])
            if backend is not None:
                self._restored.setdefault(slot.service, []).append(backend)

    def settle(self) -> None:
        """Every source has delivered: forget restored numbers and slots that no service came for."""
        self.services.settle()
        self.backends.settle()
        self._restored.clear()

    # --- what is wanted ------------------------------------------------------------------------------------------

    def update(self, key: ServiceKey, service: Service | None, slices: Iterable[EndpointSlice] = ()) -> Delta:
        """A service or its slices (all of them) changed; None: it is gone. An unchanged slice costs next to nothing
        if it is the same object as before."""
        delta = Delta()
        old = self._states.pop(key, _NO_STATE)
        new = _NO_STATE
        if service is not None:
            same = old.service == service
            new = _State(service, {s.name: s for s in slices}, old.ports if same else _frontends(service))
            self._states[key] = new
        if new is not _NO_STATE and old.service == new.service:
            self._refresh(key, old.slices, new, delta)
        else:
            self._replace(key, old, new, delta)
        self._sweep(delta)
        return delta

    def all_rows(self) -> dict[str, dict[Any, Any]]:
        """Every row, by map name."""
        rows = _three_maps()
        number = self.backends.get
        for backend in self._users:
            rows[BACKENDS][number(backend)] = Backend(*backend)
        for frontend, target in self._targets.items():
            rows[FRONTENDS][frontend] = target.row
            for slot, backend in enumerate(target.order):
                rows[SLOTS][SlotKey(target.number, slot)] = number(backend)
        return rows

    # --- for people ----------------------------------------------------------------------------------------------

    def warnings(self, key: ServiceKey) -> tuple[str, ...]:
        """What a service asks for and doesn't get, a sentence each."""
        state = self._states.get(key, _NO_STATE)
        found = [*state.service.warnings]
        for slice_ in state.slices.values():
            found += (f"EndpointSlice {slice_.name}: {text}" for text in slice_.warnings)
        for frontend, port in state.ports.items():
            owner = self._claims[frontend][0]
            if owner != key:
                found.append(f"port {port.port} of {unpack(frontend.addr)} already belongs to service {owner}")
        wanted = len({ip for ip in state.service.cluster_ips}) * len(state.service.ports)
        if len(state.ports) < wanted:
            found.append("it names the same port and protocol more than once; only the first counts")
        return tuple(found)

    def service_of(self, number: int) -> tuple[ServiceKey, ServicePort] | None:
        """Which service, and which port of it, a service id in an event or a connection stands for."""
        frontend = self.services.key(number)
        if frontend is None or frontend not in self._claims:
            return None
        owner = self._claims[frontend][0]
        return owner, self._states[owner].ports[frontend]

    # --- whole services ------------------------------------------------------------------------------------------

    def _replace(self, key: ServiceKey, old: _State, new: _State, delta: Delta) -> None:
        rebuild = {key} if new is not _NO_STATE else set()
        for frontend in old.ports.keys() - new.ports.keys():
            claims = tuple(k for k in self._claims[frontend] if k != key)
            if not claims:
                del self._claims[frontend]
                continue
            if claims[0] > key:
                rebuild.add(claims[0])
            self._claims[frontend] = claims
        for frontend in new.ports.keys() - old.ports.keys():
            self._claims[frontend] = tuple(sorted((*self._claims.get(frontend, ()), key)))
        for each in sorted(rebuild):
            self._rebuild(each, delta)
        for frontend in [f for f in old.ports if f not in self._claims]:
            self._remove(frontend, delta)

    def _rebuild(self, key: ServiceKey, delta: Delta) -> None:
        state = self._states[key]
        for frontend, port in state.ports.items():
            if self._claims[frontend][0] != key:
                continue
            target = self._targets.get(frontend) or self._new_target(frontend, delta)
            members: dict[BackendKey, Presence] = {}
            for slice_ in state.slices.values():
                for backend, step in self._contributions(state.service, frontend, port, slice_):
                    members[backend] = self._add(members.get(backend, _ABSENT), step, 1)
            for backend in sorted(members.keys() - target.members.keys()):
                self._list(backend, delta)
            for backend in target.members.keys() - members.keys():
                self._unlist(backend)
            target.set_members(members)
            self._arrange(frontend, target, None, delta)

    def _new_target(self, frontend: FrontendKey, delta: Delta) -> _Target:
        number = self.services.take(frontend)
        target = self._targets[frontend] = _Target(number, self._restored.pop(number, ()))
        # Restored slots are news to whoever collects the deltas; those of no use go again when it is arranged.
        for slot, backend in enumerate(target.order):
            delta.put(SLOTS, SlotKey(number, slot), self.backends.get(backend))
        return target

    def _remove(self, frontend: FrontendKey, delta: Delta) -> None:
        target = self._targets.pop(frontend)
        for backend in target.members:
            self._unlist(backend)
        for slot in range(len(target.order)):
            delta.drop(SLOTS, SlotKey(target.number, slot))
        delta.drop(FRONTENDS, frontend)
        self.services.release(frontend)

    # --- changed slices ------------------------------------------------------------------------------------------

    def _refresh(self, key: ServiceKey, before: dict[str, EndpointSlice], state: _State, delta: Delta) -> None:
        now = state.slices
        gone = [s for name, s in before.items() if now.get(name) is not s and now.get(name) != s]
        come = [s for name, s in now.items() if before.get(name) is not s and before.get(name) != s]
        if not gone and not come:
            return
        for frontend, port in state.ports.items():
            if self._claims[frontend][0] != key:
                continue
            target = self._targets[frontend]
            touched: set[BackendKey] = set()
            for slices, sign in ((gone, -1), (come, 1)):
                for slice_ in slices:
                    for backend, step in self._contributions(state.service, frontend, port, slice_):
                        self._adjust(target, backend, step, sign, delta)
                        touched.add(backend)
            if touched:
                self._arrange(frontend, target, touched, delta)

    def _adjust(self, target: _Target, backend: BackendKey, step: Presence, sign: int, delta: Delta) -> None:
        before = target.members.get(backend, _ABSENT)
        after = self._add(before, step, sign)
        target.ready += (after[1] > 0) - (before[1] > 0)
        if after is not _ABSENT:
            target.members[backend] = after
            if before is _ABSENT:
                self._list(backend, delta)
        else:
            del target.members[backend]
            self._unlist(backend)

    def _add(self, presence: Presence, step: Presence, sign: int) -> Presence:
        if presence is _ABSENT and sign > 0:
            return step
        total = (presence[0] + sign * step[0], presence[1] + sign * step[1], presence[2] + sign * step[2])
        # There are few different ones, so each exists once: a million members would otherwise be a million tuples.
        return self._presences.setdefault(total, total) if total[0] else _ABSENT

    def _contributions(
        self, service: Service, frontend: FrontendKey, port: ServicePort, slice_: EndpointSlice
    ) -> Iterator[tuple[BackendKey, Presence]]:
        if slice_.v4 != is_v4(frontend.addr):
            return
        numbers = [p.port for p in slice_.ports if p.name == port.name and p.proto == port.proto]
        for endpoint in slice_.endpoints:
            if service.internal_local and endpoint.node != self.node:
                continue
            if endpoint.ready or service.publish_not_ready:
                step = _READY
            else:
                step = _TERMINATING if endpoint.serving and endpoint.terminating else _LISTED
            for number in numbers:
                yield (endpoint.addr, number, port.proto), step

    # --- slots and backends --------------------------------------------------------------------------------------

    def _arrange(
        self, frontend: FrontendKey, target: _Target, touched: Iterable[BackendKey] | None, delta: Delta
    ) -> None:
        order, index = target.order, target.index
        if touched is None or (target.ready > 0) != target.served_ready:
            touched = {*order, *target.members}
        target.served_ready = target.ready > 0
        gone = sorted(index[b] for b in touched if b in index and not target.wants(b))
        come = sorted(b for b in touched if b not in index and target.wants(b))
        both = min(len(gone), len(come))
        for slot, backend in zip(gone[:both], come[:both], strict=True):
            del index[order[slot]]
            self._place(target, slot, backend, delta)
        for slot in reversed(gone[both:]):
            del index[order[slot]]
            last = order.pop()
            if slot < len(order):
                self._place(target, slot, last, delta)
            delta.drop(SLOTS, SlotKey(target.number, len(order)))
        for backend in come[both:]:
            order.append(backend)
            self._place(target, len(order) - 1, backend, delta)
        row = Frontend(target.number, len(order), FRONTEND_CLUSTER_IP)
        if row != target.row:
            target.row = row
            delta.put(FRONTENDS, frontend, row)

    def _place(self, target: _Target, slot: int, backend: BackendKey, delta: Delta) -> None:
        target.order[slot] = backend
        target.index[backend] = slot
        delta.put(SLOTS, SlotKey(target.number, slot), self.backends.take(backend))

    def _list(self, backend: BackendKey, delta: Delta) -> None:
        users = self._users.get(backend, 0)
        self._users[backend] = users + 1
        if users == 0 and backend not in self._unlisted:
            delta.put(BACKENDS, self.backends.take(backend), Backend(*backend))

    def _unlist(self, backend: BackendKey) -> None:
        self._users[backend] -= 1
        if self._users[backend] == 0:
            self._unlisted.add(backend)

    def _sweep(self, delta: Delta) -> None:
        """Only now: a backend that moved from one frontend to another has kept its number."""
        for backend in self._unlisted:
            if self._users[backend] == 0:
                del self._users[backend]
                number = self.backends.release(backend)
                if number is not None:
                    delta.drop(BACKENDS, number)
        self._unlisted.clear()


def _frontends(service: Service) -> dict[FrontendKey, ServicePort]:
    found: dict[FrontendKey, ServicePort] = {}
    for addr in service.cluster_ips:
        for port in service.ports:
            found.setdefault(FrontendKey(addr, port.port, port.proto), port)
    return found
