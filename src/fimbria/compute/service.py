"""Services: rows of every map that balances load, from Services, their EndpointSlices, and what others ask for.

Rules
1. A frontend leads to the endpoints of its service port that `service_choice` chooses. If there are none, it stays and
   refuses; a Local policy's drops silently as long as other nodes have some, as kube-proxy does.
2. Every endpoint that a slice lists keeps its backend row, ready or not: connections that chose it go on. One that no
   slice lists any more has none. A backend that several frontends lead to is one row.
3. Frontends of one service port that lead to the same endpoints share a service id and slots (a `Group`).
4. Slots are dense, and stable: a backend that goes is replaced by a new one, or else by the last. Which backend is in
   which slot therefore depends on what came before, so it is restored, like the numbers.
5. A frontend that several claim belongs to one of them: a local redirect before Services before host ports, and among
   equals the first by name. The others wait for it, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from fimbria.compute import service_frontends as front
from fimbria.compute.service_choice import ALIVE, GOING_ON, READY, SERVING, Place, Standing, standing
from fimbria.compute.service_frontends import Defaults, PortKey, Want
from fimbria.compute.service_group import Group, Members
from fimbria.compute.service_rows import (
    BACKENDS,
    FRONTENDS,
    MEMBERS,
    RANGES,
    SLOTS,
    TABLES,
    BackendKey,
    Delta,
    no_rows,
)
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix, is_v4, unpack
from fimbria.model.rows import Backend, Frontend, FrontendKey, MemberKey, SlotKey
from fimbria.model.service import (
    DEFAULT_WEIGHT,
    EndpointSlice,
    NodeTopology,
    Service,
    ServiceKey,
    ServicePort,
    TableContent,
)

__all__ = (
    "BACKENDS", "FRONTENDS", "MEMBERS", "RANGES", "SLOTS", "TABLES",
    "BackendKey", "Delta", "Description", "Extra", "Owner", "ServiceCompute",
)  # fmt: skip

_PROTOCOLS: Final = {6: "TCP", 17: "UDP", 132: "SCTP"}
_KINDS: Final = {front.CLUSTER_IP: "ClusterIP", front.NODE_PORT: "NodePort", front.HOST_PORT: "HostPort"}
_SERVES: Final[Standing] = GOING_ON | READY | SERVING | ALIVE
_new: Final = tuple.__new__  # a NamedTuple's own is three times as slow
REDIRECT: Final = 0
SERVICE: Final = 1
HOST_PORT: Final = 2


class Owner(NamedTuple):
    """Who claims frontends. Of several the lowest wins: `rank` is REDIRECT, SERVICE or HOST_PORT; `kind` is for people
    ("service", "pod", ...)."""

    rank: int
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Extra:
    """Frontends that lead to given backends: a pod's hostPort, a local redirect.

    `frontends` are of SCOPE_ALL and of one family and protocol, as are the backends (address, port, protocol); they
    share a service id. `flags`: enum frontend_flag (HOST_PORT, EXEMPT, ...), for each of them. Without backends they
    refuse: to leave a frontend to the next in line, don't name it.
    """

    frontends: tuple[FrontendKey, ...]
    backends: tuple[BackendKey, ...]
    flags: int
    port_name: str = ""


class Description(NamedTuple):
    """A frontend for people: `kind` is ClusterIP, NodePort, LoadBalancer, ExternalIP, HostPort or LocalRedirect."""

    owner: Owner
    port: ServicePort
    kind: str
    local: bool
    ranges: frozenset[Prefix]


@dataclass(slots=True)
class _State:
    """What an owner claims (`plan`), and the endpoints of each of its ports that has at least one frontend."""

    service: Service
    slices: dict[str, EndpointSlice] = field(default_factory=dict)
    extras: tuple[Extra, ...] = ()
    plan: dict[FrontendKey, Want] = field(default_factory=dict)
    ports: dict[PortKey, ServicePort] = field(default_factory=dict)
    members: dict[PortKey, Members] = field(default_factory=dict)


class ServiceCompute:
    """Incremental by service: `update`, `set_extra` and `set_topology` return what changed, `all_rows` the whole; both
    always agree."""

    def __init__(
        self,
        node: str,
        services: Numbers[Any],
        backends: Numbers[Backend],
        defaults: Defaults = Defaults(),  # noqa: B008 frozen
    ) -> None:
        """`node` is this node's name, as endpoints state it."""
        self.place = Place(node)
        self.services = services
        self.backends = backends
        self.defaults = defaults
        self.topology = NodeTopology()
        self._node_addrs: frozenset[bytes] = frozenset()
        self._states: dict[Owner, _State] = {}
        self._owners: dict[FrontendKey, Owner] = {}
        self._waiting: dict[FrontendKey, list[Owner]] = {}
        self._groups: dict[int, tuple[Owner, Group]] = {}
        self._frontends: dict[FrontendKey, Frontend] = {}
        self._addresses: dict[bytes, list[int]] = {}  # of Services: how many have it as cluster IP, as another one
        self._users: dict[int, int] = {}
        self._unlisted: set[int] = set()
        self._restored: dict[int, list[int]] = {}
        self._adoptable: dict[FrontendKey, int] = {}
        self._losing: set[int] = set()
        self._standings: dict[tuple[bool, bool], dict[tuple[Any, ...], Standing]] = {}

    # --- decided state -------------------------------------------------------------------------------------------

    def restore(
        self,
        frontends: Mapping[FrontendKey, Frontend],
        slots: Mapping[SlotKey, int],
        backends: Mapping[int, Backend],
        spent_backends: Iterable[int] = (),
    ) -> None:
        """Take over numbers and slots from rows read back from the kernel, before the first `update`.

        A service id is known again by the first of its frontends. `spent_backends`: ids that connections may still
        name. Rows that contradict each other are left out, and with that written anew. Raises ValueError after the
        first `update`.
        """
        first: dict[int, FrontendKey] = {}
        for key, row in frontends.items():
            known = first.get(row.service)
            if row.service and (known is None or _rank(key, row.flags) < _rank(known, frontends[known].flags)):
                first[row.service] = key
        self.services.restore((key, number) for number, key in first.items())
        self._adoptable = {key: number for number, key in first.items()}
        self.backends.restore(((row, number) for number, row in backends.items()), spent_backends)
        for slot in sorted(slots, key=lambda s: (s.service, s.slot)):
            if self.backends.key(slots[slot]) is not None:
                self._restored.setdefault(slot.service, []).append(slots[slot])

    def settle(self) -> None:
        """Every source has delivered: forget restored numbers and slots that no service came for."""
        self.services.settle()
        self.backends.settle()
        self._restored.clear()
        self._adoptable.clear()

    # --- what is wanted ------------------------------------------------------------------------------------------

    def update(
        self,
        key: ServiceKey,
        service: Service | None,
        slices: Iterable[EndpointSlice] = (),
        delta: Delta | None = None,
    ) -> Delta:
        """A service or its slices (all of them) changed; None: it is gone. An unchanged slice costs next to nothing
        if it is the same object as before. What changes is added to `delta`, if one is given."""
        delta = Delta() if delta is None else delta
        owner = Owner(SERVICE, "service", *key)
        old = self._states.get(owner)
        now = {s.name: s for s in slices}
        if old is not None and service is not None and (old.service is service or old.service == service):
            before, old.slices = old.slices, now
            self._refresh(old, before, delta)
        else:
            new = self._planned(service, now) if service is not None else None
            if new is not None and old is not None:
                new.members = old.members
            self._count_addresses(old, new, delta)
            self._replace(owner, old, new, delta)
        self._sweep(delta)
        return delta

    def set_extra(self, owner: Owner, extras: Iterable[Extra]) -> Delta:
        """Everything that `owner` claims beside Services, in place of what it claimed before; nothing: it is gone.

        A REDIRECT owner takes frontends over from Services for as long as it claims them; a HOST_PORT one gets those
        that no Service has. `claimed` says who has a frontend, `number` its service id.
        """
        delta, wanted = Delta(), tuple(extras)
        old = self._states.get(owner)
        if wanted and old is not None and old.extras == wanted:
            return delta
        new = _extra_state(owner, wanted) if wanted else None
        if new is not None and old is not None:
            new.members = old.members
        self._replace(owner, old, new, delta)
        self._sweep(delta)
        return delta

    def set_topology(self, topology: NodeTopology, node_addrs: Iterable[bytes] = ()) -> Delta:
        """This node's labels changed, or the addresses of nodes (of all of them): what depends on them is done again.

        An address of a node belongs to that node, whatever Services say.
        """
        delta = Delta()
        zone, former = topology.zone, self.topology
        addrs = frozenset(node_addrs) | frozenset(topology.addrs)
        changed, self._node_addrs = addrs ^ self._node_addrs, addrs
        for addr in changed & self._addresses.keys():
            self._address_row(addr, delta)
        self.topology, self.place = topology, self.place._replace(zone=zone)
        self._standings.clear()
        for owner, state in list(self._states.items()):
            hinted = zone != former.zone and any(e.zones for s in state.slices.values() for e in s.endpoints)
            selected = former.labels != topology.labels and state.service.nodes is not None
            if owner.rank == SERVICE and (hinted or selected):
                new = self._planned(state.service, state.slices)
                new.members = state.members
                self._count_addresses(state, new, delta)
                self._replace(owner, state, new, delta)
        self._sweep(delta)
        return delta

    def all_rows(self) -> dict[str, dict[Any, Any]]:
        """Every row, by map name."""
        rows = no_rows()
        for number in self._users:
            key = self.backends.key(number)
            assert key is not None
            rows[BACKENDS][number] = key
        rows[FRONTENDS].update(self._frontends)
        for number, (_, group) in self._groups.items():
            rows[SLOTS].update((SlotKey(number, slot), backend) for slot, backend in enumerate(group.order))
            if group.affinity:
                rows[MEMBERS].update((MemberKey(number, backend), 1) for backend in group.order)
            rows[RANGES].update((front.source_key(number, prefix), 1) for prefix in group.ranges)
            if group.table is not None:
                rows[TABLES][number] = group.table
        return rows

    # --- for people and for others -------------------------------------------------------------------------------

    def warnings(self, key: ServiceKey) -> tuple[str, ...]:
        """What a service asks for and doesn't get, a sentence each."""
        owner = Owner(SERVICE, "service", *key)
        state = self._states.get(owner)
        if state is None:
            return ()
        found = [*state.service.warnings]
        for slice_ in state.slices.values():
            found += (f"EndpointSlice {slice_.name}: {text}" for text in slice_.warnings)
        found += self._lost(owner, state)
        if len({(p.port, p.proto) for p in state.service.ports}) < len(state.service.ports):
            found.append("it names the same port and protocol more than once; only the first counts")
        return tuple(found)

    def conflicts(self, owner: Owner) -> tuple[str, ...]:
        """Which frontends an owner of extras asks for and doesn't get, a sentence each."""
        state = self._states.get(owner)
        return tuple(self._lost(owner, state)) if state is not None else ()

    def service_of(self, number: int) -> tuple[ServiceKey, ServicePort] | None:
        """Which service, and which port of it, a service id in an event or a connection stands for. For extras the
        name is their owner's."""
        found = self._groups.get(number)
        if found is None:
            return None
        owner, group = found
        return ServiceKey(owner.namespace, owner.name), self._members_of(owner, group).port

    def describe(self, frontend: FrontendKey) -> Description | None:
        """What a frontend is, for people; None for one that isn't there, and for rows of whole addresses."""
        row = self._frontends.get(frontend)
        if row is None or row.flags & front.ADDRESS:
            return None
        owner, group = self._groups[row.service]
        want, state = group.frontends[frontend], self._states[owner]
        kind = "ExternalIP"
        if owner.rank == REDIRECT:
            kind = "LocalRedirect"
        elif frontend.addr in state.service.load_balancer_ips:
            kind = "LoadBalancer"
        for flag, name in _KINDS.items():
            kind = name if want.flags & flag and owner.rank != REDIRECT else kind
        return Description(owner, self._members_of(owner, group).port, kind, want.local, group.ranges)

    def unserved(self) -> list[ServiceKey]:
        """Services without any frontend that have something to say about it."""
        found = (
            ServiceKey(o.namespace, o.name) for o, s in self._states.items() if o.rank == SERVICE and not s.members
        )
        return [key for key in found if self.warnings(key)]

    def owner_of(self, number: int) -> Owner | None:
        """Who has the frontends of a service id."""
        found = self._groups.get(number)
        return found[0] if found else None

    def take_losing(self) -> set[int]:
        """Service ids that may have lost a backend since the last call: sockets may still talk to it."""
        found, self._losing = self._losing, set()
        return found

    def keeps(self, number: int, addr: bytes, port: int) -> bool:
        """Whether what a client has with a backend of a service may go on: it is still listed, and alive."""
        found = self._groups.get(number)
        if found is None:
            return False
        members = self._members_of(*found)
        backend = self.backends.get(Backend(addr, port, members.port.proto))
        return backend is not None and members.standings.get(backend, 0) & ALIVE > 0

    def claimed(self, frontend: FrontendKey) -> Owner | None:
        """Who has a frontend (of SCOPE_ALL)."""
        return self._owners.get(frontend)

    def number(self, frontend: FrontendKey) -> int | None:
        """The service id of a frontend."""
        row = self._frontends.get(frontend)
        return row.service if row else None

    def local_ready(self, key: ServiceKey, *, v4: bool) -> int:
        """How many endpoints of a family a health check of this node counts: those of this node that serve."""
        state = self._states.get(Owner(SERVICE, "service", *key))
        found: set[bytes] = set()
        for port, members in state.members.items() if state else ():
            wanted = members.wanted(True) if port.v4 == v4 else frozenset()
            for backend, stands in members.standings.items():
                name = self.backends.key(backend) if stands in wanted and stands & READY else None
                if name is not None:
                    found.add(name[0])
        return len(found)

    def _lost(self, owner: Owner, state: _State) -> Iterator[str]:
        for frontend in state.plan:
            winner = self._owners[frontend]
            if winner != owner and (winner.rank != REDIRECT or owner.rank == REDIRECT):
                yield f"{_named(frontend)} already belongs to {winner}"

    def _members_of(self, owner: Owner, group: Group) -> Members:
        want = next(iter(group.frontends.values()))
        return self._states[owner].members[want.port]

    # --- claims --------------------------------------------------------------------------------------------------

    def _planned(self, service: Service, slices: dict[str, EndpointSlice]) -> _State:
        if service.nodes is not None and not service.nodes(dict(self.topology.labels)):
            return _State(service, slices)
        return _State(service, slices, (), front.frontends(service, self.defaults), front.ports(service))

    def _replace(self, owner: Owner, old: _State | None, new: _State | None, delta: Delta) -> None:
        """Another state of an owner: settle who has which frontend, then take from the losers, then give."""
        before = old.plan if old is not None else {}
        after = new.plan if new is not None else {}
        losers, winners = {owner: None}, {owner: None}
        for frontend in before.keys() - after.keys() if before else ():
            heir = self._unclaim(frontend, owner)
            if heir is not None:
                winners[heir] = None
        for frontend in after:
            if frontend not in before:
                loser = self._claim(frontend, owner)
                if loser is not None:
                    losers[loser] = None
        if new is not None:
            self._states[owner] = new
        elif old is not None:
            self._states[owner] = replace(old, plan={})
        for each in losers:
            self._shed(each, self._states.get(each), delta)
        if new is None:
            self._states.pop(owner, None)
        for each in losers | winners:
            if each in self._states:
                self._fill(each, self._states[each], delta)

    def _claim(self, frontend: FrontendKey, owner: Owner) -> Owner | None:
        """Returns who lost it."""
        holder = self._owners.get(frontend)
        if holder is None:
            self._owners[frontend] = owner
            return None
        if holder < owner:
            self._waiting.setdefault(frontend, []).append(owner)
            return None
        self._waiting.setdefault(frontend, []).append(holder)
        self._owners[frontend] = owner
        return holder

    def _unclaim(self, frontend: FrontendKey, owner: Owner) -> Owner | None:
        """Returns who has it now, if that has changed."""
        waiting = self._waiting.get(frontend)
        if self._owners[frontend] != owner:
            assert waiting is not None
            waiting.remove(owner)
            heir = None
        elif waiting:
            heir = self._owners[frontend] = min(waiting)
            waiting.remove(heir)
        else:
            del self._owners[frontend]
            return None
        if not waiting:
            del self._waiting[frontend]
        return heir

    # --- addresses -----------------------------------------------------------------------------------------------

    def _count_addresses(self, old: _State | None, new: _State | None, delta: Delta) -> None:
        before = front.service_addresses(old.service) if old is not None and old.plan else {}
        after = front.service_addresses(new.service) if new is not None and new.plan else {}
        if before == after:
            return
        for addresses, step in ((before, -1), (after, 1)):
            for addr, flags in addresses.items():
                counts = self._addresses.setdefault(addr, [0, 0])
                counts[0 if flags else 1] += step
        for addr in before | after:
            if not any(self._addresses[addr]):
                del self._addresses[addr]
            self._address_row(addr, delta)

    def _address_row(self, addr: bytes, delta: Delta) -> None:
        counts = None if addr in self._node_addrs else self._addresses.get(addr)
        key = FrontendKey(addr, 0, 0)
        if counts is None:
            if self._frontends.pop(key, None) is not None:
                delta.drop(FRONTENDS, key)
            return
        row = Frontend(0, 0, front.ADDRESS | (0 if counts[1] else front.CLUSTER_IP))
        if self._frontends.get(key) != row:
            self._frontends[key] = row
            delta.put(FRONTENDS, key, row)

    # --- groups --------------------------------------------------------------------------------------------------

    def _shed(self, owner: Owner, state: _State | None, delta: Delta) -> None:
        """Give up frontends that aren't planned any more or have become another's."""
        if state is None:
            return
        needed = self._grouped(owner, state)
        for port, members in list(state.members.items()):
            for local, group in list(members.groups.items()):
                kept = needed.get((port, local), {})
                for frontend in group.frontends.keys() - kept.keys():
                    del group.frontends[frontend], self._frontends[frontend]
                    delta.drop(FRONTENDS, frontend)
                if not kept:
                    del members.groups[local]
                    self._dissolve(group, delta)
            if not members.groups:
                del state.members[port]
                for backend in members.standings:
                    self._unlist(backend)

    def _grouped(self, owner: Owner, state: _State) -> dict[tuple[PortKey, bool], dict[FrontendKey, Want]]:
        """The frontends that are planned and won, by the group they belong to."""
        grouped: dict[tuple[PortKey, bool], dict[FrontendKey, Want]] = {}
        for frontend, want in state.plan.items():
            if self._owners[frontend] == owner:
                grouped.setdefault((want.port, want.local), {})[frontend] = want
                if want.flags & front.TWO_SCOPES:
                    inside = Want(want.port, False, want.flags & ~front.OUTSIDE_ONLY)
                    grouped.setdefault((want.port, False), {})[frontend._replace(scope=front.SCOPE_INTERNAL)] = inside
        return grouped

    def _dissolve(self, group: Group, delta: Delta) -> None:
        for slot in range(len(group.order)):
            delta.drop(SLOTS, SlotKey(group.number, slot))
        self._admit(group, frozenset(), delta)
        self._set_affinity(group, 0, delta)
        if group.table is not None:
            delta.drop(TABLES, group.number)
        del self._groups[group.number]
        self._losing.add(group.number)
        self.services.release(group.key)

    def _fill(self, owner: Owner, state: _State, delta: Delta) -> None:
        """Take the frontends that are planned and won, and bring everything behind them up to date."""
        grouped = self._grouped(owner, state)
        for port in dict.fromkeys(port for port, _ in grouped):
            members = state.members.get(port)
            if members is None:
                members = state.members[port] = Members(state.ports[port])
            members.port = state.ports[port]
            self._relist(state, port, members, delta)
        for (port, local), frontends in grouped.items():
            members = state.members[port]
            group = members.groups.get(local)
            if group is None:
                group = members.groups[local] = self._new_group(owner, port, local, frontends)
            group.frontends = frontends
            if not state.service.affinity_seconds:
                self._set_affinity(group, 0, delta)
            self._arrange(members, group, local, None, delta)
            self._set_affinity(group, state.service.affinity_seconds, delta)
            limited = any(want.flags & front.SOURCE_RANGES for want in frontends.values())
            self._admit(group, front.ranges(state.service, port.v4) if limited else frozenset(), delta)
            self._finish(members, group, local, delta)

    def _new_group(self, owner: Owner, port: PortKey, local: bool, frontends: Iterable[FrontendKey]) -> Group:
        key = (owner, port, local)
        for frontend in frontends if self._adoptable else ():
            number = self._adoptable.get(frontend)
            if number is not None and self.services.adopt(key, number):
                del self._adoptable[frontend]
                break
        number = self.services.take(key)
        group = Group(key, number, self._restored.pop(number, ()))
        self._groups[number] = owner, group
        return group

    def _admit(self, group: Group, ranges: frozenset[Any], delta: Delta) -> None:
        if ranges != group.ranges:
            for prefix in group.ranges - ranges:
                delta.drop(RANGES, front.source_key(group.number, prefix))
            for prefix in ranges - group.ranges:
                delta.put(RANGES, front.source_key(group.number, prefix), 1)
            group.ranges = ranges

    def _set_affinity(self, group: Group, seconds: int, delta: Delta) -> None:
        """`arrange` keeps the rows of a group that had affinity before."""
        if bool(seconds) != bool(group.affinity):
            for backend in group.order:
                key = MemberKey(group.number, backend)
                if seconds:
                    delta.put(MEMBERS, key, 1)
                else:
                    delta.drop(MEMBERS, key)
        group.affinity = seconds

    # --- endpoints -----------------------------------------------------------------------------------------------

    def _relist(self, state: _State, port: PortKey, members: Members, delta: Delta) -> None:
        """All listings anew: whatever decides about standings may have changed."""
        former, weights = members.standings, dict[int, int]()
        now = members.clear()
        for found, weight in self._listings(state, port):
            for key, stands in found.items():
                backend, least = self.backends.take(key), 0
                if backend in now:
                    members.add(backend, stands)
                    least = weights.get(backend, DEFAULT_WEIGHT)
                else:
                    now[backend] = stands
                    if backend not in former:
                        self._list(backend, key, delta)
                if weight != DEFAULT_WEIGHT or backend in weights:
                    weights[backend] = max(weight, least)
        members.recount(weights)
        for backend in former.keys() - now.keys() if former else ():
            self._unlist(backend)

    def _refresh(self, state: _State, former: dict[str, EndpointSlice], delta: Delta) -> None:
        """Only slices changed: only what differs in them is looked at."""
        now = state.slices
        changed: list[tuple[EndpointSlice | None, EndpointSlice | None]] = [
            (s, now.get(name)) for name, s in former.items() if now.get(name) is not s and now.get(name) != s
        ]
        changed += [(None, s) for name, s in now.items() if name not in former]
        if not changed:
            return
        weighed = any(s.weight != DEFAULT_WEIGHT for slices in (former, now) for s in slices.values())
        for port, members in state.members.items():
            touched: list[int] = []
            if weighed:
                self._relist(state, port, members, delta)
            else:
                for old, new in changed:
                    before = self._contributions(state, port, old)
                    touched += self._exchange(members, before, self._contributions(state, port, new), delta)
                if not touched:
                    continue
            stable = members.decide()
            for local, group in members.groups.items():
                moved = not touched or (group.serves ^ members.wanted(local)) & stable
                self._arrange(members, group, local, None if moved else touched, delta)
                self._finish(members, group, local, delta)

    def _exchange(
        self, members: Members, before: dict[Backend, Standing], after: dict[Backend, Standing], delta: Delta
    ) -> Iterator[int]:
        """One slice says something else now. Yields the backends that it is about."""
        for key, stands in before.items():
            if after.get(key) != stands:
                backend = self.backends.take(key)
                yield backend
                if members.remove(backend, stands):
                    self._unlist(backend)
        for key, stands in after.items():
            if before.get(key) != stands:
                backend = self.backends.take(key)
                yield backend
                if members.add(backend, stands):
                    self._list(backend, key, delta)

    def _listings(self, state: _State, port: PortKey) -> Iterator[tuple[dict[Backend, Standing], int]]:
        for slice_ in state.slices.values():
            yield self._contributions(state, port, slice_), slice_.weight
        if state.extras:
            yield {Backend(*key): _SERVES for key in state.extras[port.port].backends}, DEFAULT_WEIGHT

    def _contributions(self, state: _State, key: PortKey, slice_: EndpointSlice | None) -> dict[Backend, Standing]:
        """The backends that a slice lists for a port. One that it lists twice stands as its best listing."""
        found: dict[Backend, Standing] = {}
        if slice_ is None or slice_.v4 != key.v4:
            return found
        name, proto = state.ports[key].name, key.proto
        publish, drained = state.service.publish_not_ready, slice_.weight == 0
        known = self._standings.setdefault((publish, drained), {})
        for number in [p.port for p in slice_.ports if p.name == name and p.proto == proto]:
            for endpoint in slice_.endpoints:
                # What is asked for every endpoint of the cluster has few answers: by all there is but the address.
                stands = known.get(endpoint[1:])
                if stands is None:
                    stands = standing(endpoint, self.place, publish_not_ready=publish, drained=drained)
                    known[endpoint[1:]] = stands
                backend = _new(Backend, (endpoint[0], number, proto, 0))
                if stands > found.setdefault(backend, stands):
                    found[backend] = stands
        return found

    # --- slots and backends --------------------------------------------------------------------------------------

    def _arrange(
        self, members: Members, group: Group, local: bool, touched: Iterable[int] | None, delta: Delta
    ) -> None:
        """Bring the slots up to date; `touched` None: every endpoint may serve or not serve now."""
        if touched is None:
            members.decide()
            self._losing.add(group.number)
            touched = members.standings if group.fresh and not group.order else (*group.order, *members.standings)
        elif not all(members.standings.get(b, 0) & ALIVE for b in touched):
            self._losing.add(group.number)
        group.serves = serves = members.wanted(local)
        order, index, stands = group.order, group.index, members.standings
        if group.fresh and not order:
            order += [b for b in touched if stands[b] in serves]
            index.update(zip(order, range(len(order)), strict=True))
            self._show(group, delta)
            return
        touched = dict.fromkeys(touched)
        gone = sorted(index[b] for b in touched if b in index and stands.get(b) not in serves)
        come = [b for b in touched if b not in index and stands.get(b) in serves]
        both = min(len(gone), len(come))
        for slot, backend in zip(gone[:both], come[:both], strict=True):
            self._leave(group, order[slot], delta)
            order[slot] = backend
            self._place(group, slot, backend, delta)
        for slot in reversed(gone[both:]):
            self._leave(group, order[slot], delta)
            last = order.pop()
            if slot < len(order):
                order[slot] = last
                index[last] = slot
                if not group.fresh:
                    delta.put(SLOTS, SlotKey(group.number, slot), last)
            if not group.fresh:
                delta.drop(SLOTS, SlotKey(group.number, len(order)))
        for backend in come[both:]:
            order.append(backend)
            self._place(group, len(order) - 1, backend, delta)
        if group.fresh:
            self._show(group, delta)

    def _show(self, group: Group, delta: Delta) -> None:
        """All slots of a new group. Restored ones are news to whoever collects the deltas."""
        number = group.number
        delta.upserts[SLOTS].update((_new(SlotKey, (number, slot)), b) for slot, b in enumerate(group.order))
        group.fresh = False

    def _place(self, group: Group, slot: int, backend: int, delta: Delta) -> None:
        group.index[backend] = slot
        if not group.fresh:
            delta.put(SLOTS, SlotKey(group.number, slot), backend)
        if group.affinity:
            delta.put(MEMBERS, MemberKey(group.number, backend), 1)

    def _leave(self, group: Group, backend: int, delta: Delta) -> None:
        del group.index[backend]
        if group.affinity:
            delta.drop(MEMBERS, MemberKey(group.number, backend))

    def _finish(self, members: Members, group: Group, local: bool, delta: Delta) -> None:
        """The rows that follow from the slots: frontends, and the table."""
        count = len(group.order)
        more = front.SILENT if not count and local and members.choice.anywhere else 0
        more |= front.TABLE if members.weights else 0
        tabled = False
        for frontend, want in group.frontends.items():
            row = Frontend(group.number, count, want.flags | more, group.affinity)
            tabled = tabled or row.flags & front.TABLE > 0
            if self._frontends.get(frontend) != row:
                self._frontends[frontend] = row
                delta.put(FRONTENDS, frontend, row)
        if tabled:
            table = _table(members, group)
            if group.table != table:
                delta.put(TABLES, group.number, table)
            group.table = table
        elif group.table is not None:
            delta.drop(TABLES, group.number)
            group.table = None

    def _list(self, backend: int, key: Backend, delta: Delta) -> None:
        users = self._users.get(backend, 0)
        self._users[backend] = users + 1
        if users == 0 and backend not in self._unlisted:
            delta.put(BACKENDS, backend, key)

    def _unlist(self, backend: int) -> None:
        self._users[backend] -= 1
        if self._users[backend] == 0:
            self._unlisted.add(backend)

    def _sweep(self, delta: Delta) -> None:
        """Only now: a backend that moved from one frontend to another has kept its number."""
        for backend in self._unlisted:
            if self._users[backend] == 0:
                del self._users[backend]
                key = self.backends.key(backend)
                assert key is not None
                self.backends.release(key)
                delta.drop(BACKENDS, backend)
        self._unlisted.clear()


def _table(members: Members, group: Group) -> TableContent:
    weights = members.weights
    return TableContent(tuple((b, weights.get(b, DEFAULT_WEIGHT)) for b in sorted(group.order)))


def _extra_state(owner: Owner, extras: tuple[Extra, ...]) -> _State:
    """Extras are numbered: that number stands in the place of a service's port."""
    state = _State(Service(ServiceKey(owner.namespace, owner.name)), extras=extras)
    for number, extra in enumerate(extras):
        if not extra.frontends:
            continue
        first = extra.frontends[0]
        key = PortKey(number, first.proto, is_v4(first.addr))
        state.ports[key] = ServicePort(extra.port_name, first.port, first.proto)
        for frontend in extra.frontends:
            state.plan.setdefault(frontend, Want(key, False, extra.flags))
    return state


def _rank(key: FrontendKey, flags: int) -> tuple[int, int, bytes, int, int]:
    """Which frontend of a group its number is known by after a restart: the steadiest."""
    kind = 0 if flags & front.CLUSTER_IP else 1 if flags & front.NODE_PORT else 2
    return kind, key.scope, key.addr, key.port, key.proto


def _named(frontend: FrontendKey) -> str:
    if frontend.addr in front.UNSPECIFIED.values():
        family = "IPv4" if is_v4(frontend.addr) else "IPv6"
        return f"port {frontend.port}/{_PROTOCOLS.get(frontend.proto, frontend.proto)} of the nodes ({family})"
    return f"port {frontend.port} of {unpack(frontend.addr)}"
