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
   equals the most trusted claim (a cluster IP, an API server, a balancer's address, an external IP), then the first by
   name. The others wait for it, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, NamedTuple

from fimbria.compute import service_frontends as front
from fimbria.compute.service_addresses import ServiceAddresses
from fimbria.compute.service_backends import ListedBackends
from fimbria.compute.service_choice import ALIVE, GOING_ON, READY, SERVING, Place, Standing, standing
from fimbria.compute.service_claims import (
    API_SERVER,
    HOST_PORT,
    LOCAL_REDIRECT,
    REDIRECT,
    SERVICE,
    Claims,
    Extra,
    Owner,
)
from fimbria.compute.service_frontends import Defaults, PortKey, Want
from fimbria.compute.service_group import Group, Members
from fimbria.compute.service_rows import BACKENDS, FRONTENDS, MEMBERS, RANGES, SLOTS, TABLES, BackendKey, Delta, no_rows
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix, is_v4
from fimbria.model.protocol import WITH_PORTS
from fimbria.model.rows import Backend, Frontend, FrontendKey, SlotKey
from fimbria.model.service import (
    DEFAULT_WEIGHT,
    Endpoint,
    EndpointSlice,
    NodeTopology,
    Service,
    ServiceKey,
    ServicePort,
)

__all__ = (
    "BACKENDS",
    "FRONTENDS",
    "HOST_PORT",
    "MEMBERS",
    "RANGES",
    "REDIRECT",
    "SERVICE",
    "SLOTS",
    "TABLES",
    "BackendKey",
    "Delta",
    "Description",
    "Extra",
    "Owner",
    "ServiceCompute",
)  # fmt: skip

API_SERVERS: Final = Owner(SERVICE, "API server", "default", "kubernetes")
_KINDS: Final = {front.CLUSTER_IP: "ClusterIP", front.NODE_PORT: "NodePort", front.HOST_PORT: "HostPort"}
MAX_KNOWN: Final = 1 << 16
Listing = tuple[Backend, Standing]
_SERVES: Final[Standing] = GOING_ON | READY | SERVING | ALIVE
_new: Final = tuple.__new__  # a NamedTuple's own is three times as slow


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
        self._states: dict[Owner, _State] = {}
        self._claims = Claims()
        self._reserved: frozenset[FrontendKey] = frozenset()
        self._announced: dict[Owner, _State] = {}
        self._groups: dict[int, tuple[Owner, Group]] = {}
        self._frontends: dict[FrontendKey, Frontend] = {}
        self._addresses = ServiceAddresses(self._frontends)
        self._listed = ListedBackends(backends)
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

    def announce(self, services: Iterable[tuple[ServiceKey, Service]], delta: Delta) -> None:
        """Services whose `update` follows: each claims what it wants before any is given anything. A loser that came
        first would take over the number of who had the frontend before a restart, and break its connections."""
        losers = dict[Owner, None]()
        for key, service in services:
            owner = Owner(SERVICE, "service", *key)
            if owner in self._states or owner in self._announced:
                continue
            state = self._announced[owner] = self._planned(service, {})
            for frontend, want in state.plan.items():
                loser = self._claims.claim(frontend, owner, want.trust)
                if loser is not None:
                    losers[loser] = None
        self._settle_claims(losers, {}, delta)

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
            told = self._announced.get(owner)
            if service is None:
                new = None
            elif told is not None and told.service is service:
                new, told.slices = told, now
            else:
                new = self._planned(service, now)
            if new is not None and old is not None:
                new.members = old.members
            self._addresses.exchange(_addresses(old), _addresses(new))
            self._replace(owner, old, new, delta)
        self._addresses.settle(delta)
        self._listed.sweep(delta)
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
        self._listed.sweep(delta)
        return delta

    def set_api_servers(self, frontends: Iterable[FrontendKey]) -> Delta:
        """Where the API servers themselves are: no Service's external address takes them over, for nobody would hear
        that the Service is gone. No rows come of it."""
        delta, wanted = Delta(), frozenset(frontends)
        losers, heirs = dict[Owner, None](), dict[Owner, None]()
        for frontend in self._reserved - wanted:
            heir = self._claims.unclaim(frontend, API_SERVERS)
            if heir is not None:
                heirs[heir] = None
        for frontend in wanted - self._reserved:
            loser = self._claims.claim(frontend, API_SERVERS, API_SERVER)
            if loser is not None:
                losers[loser] = None
        self._reserved = wanted
        self._settle_claims(losers, heirs, delta)
        self._listed.sweep(delta)
        return delta

    def set_nodes(self, changed: Mapping[str, Iterable[bytes]]) -> Delta:
        """The addresses of the nodes that changed, by name: they belong to those nodes, whatever Services say."""
        delta = Delta()
        for name, addrs in changed.items():
            self._addresses.set_node(name, addrs)
        self._addresses.settle(delta)
        return delta

    def set_topology(self, topology: NodeTopology) -> Delta:
        """This node's labels or addresses changed: what depends on them is done again."""
        delta = Delta()
        self._addresses.set_node("", topology.addrs)
        zone, former = topology.zone, self.topology
        if topology.labels == former.labels:
            self.topology = topology
            self._addresses.settle(delta)
            return delta
        self.topology, self.place = topology, self.place._replace(zone=zone)
        self._standings.clear()
        for owner, state in list(self._states.items()):
            hinted = zone != former.zone and any(e.zones for s in state.slices.values() for e in s.endpoints)
            if owner.rank == SERVICE and (hinted or state.service.nodes is not None):
                new = self._planned(state.service, state.slices)
                new.members = state.members
                self._addresses.exchange(_addresses(state), _addresses(new))
                self._replace(owner, state, new, delta)
        self._addresses.settle(delta)
        self._listed.sweep(delta)
        return delta

    def all_rows(self) -> dict[str, dict[Any, Any]]:
        """Every row, by map name."""
        rows = no_rows()
        rows[BACKENDS].update(self._listed.rows())
        rows[FRONTENDS].update(self._frontends)
        for _, group in self._groups.values():
            group.add_rows(rows)
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
        found += self._claims.lost(owner, state.plan)
        if len({(p.port, p.proto) for p in state.service.ports}) < len(state.service.ports):
            found.append("it names the same port and protocol more than once; only the first counts")
        return tuple(found)

    def conflicts(self, owner: Owner) -> tuple[str, ...]:
        """Which frontends an owner of extras asks for and doesn't get, a sentence each."""
        state = self._states.get(owner)
        return tuple(self._claims.lost(owner, state.plan)) if state is not None else ()

    def service_of(self, number: int) -> tuple[ServiceKey, ServicePort] | None:
        """Which service, and which port of it, a service id in an event or a connection stands for. For extras the
        name is their owner's."""
        found = self._groups.get(number)
        if found is None:
            return None
        owner, group = found
        return ServiceKey(owner.namespace, owner.name), self._members_of(owner, group).port

    def has_address(self, addr: bytes) -> bool:
        """Whether an address is a Service's cluster IP or balancer's address, whatever its ports."""
        return FrontendKey(addr, 0, 0) in self._frontends

    def describe(self, frontend: FrontendKey) -> Description | None:
        """What a frontend is, for people; None for one that isn't there, and for rows of whole addresses."""
        row = self._frontends.get(frontend)
        if row is None or row.flags & front.ADDRESS:
            return None
        owner, group = self._groups[row.service]
        want, state = group.frontends[frontend], self._states[owner]
        kind = "ExternalIP"
        if owner.kind == LOCAL_REDIRECT:
            kind = "LocalRedirect"
        elif frontend.addr in state.service.load_balancer_ips:
            kind = "LoadBalancer"
        for flag, name in _KINDS.items():
            kind = name if want.flags & flag and owner.kind != LOCAL_REDIRECT else kind
        return Description(owner, self._members_of(owner, group).port, kind, want.local, group.ranges)

    def unserved(self) -> list[ServiceKey]:
        """Services without any frontend that have something to say about it."""
        found = (
            ServiceKey(o.namespace, o.name) for o, s in self._states.items() if o.rank == SERVICE and not s.members
        )
        return [key for key in found if self.warnings(key)]

    def take_losing(self) -> set[int]:
        """Service ids that may have lost a backend since the last call: sockets may still talk to it."""
        found, self._losing = self._losing, set()
        return found

    def lists(self, addr: bytes, port: int) -> bool:
        """Whether any service lists an endpoint, alive or not, under any protocol."""
        return any(self.backends.get(Backend(addr, port, proto)) is not None for proto in WITH_PORTS.values())

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
        return self._claims.holder(frontend)

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
        told = self._announced.pop(owner, None)
        before = old.plan if old is not None else told.plan if told is not None else {}
        after = new.plan if new is not None else {}
        losers, winners = {owner: None}, {owner: None}
        kept = {f for f in before.keys() & after.keys() if before[f].trust == after[f].trust} if before else set()
        for frontend in before.keys() - kept:
            heir = self._claims.unclaim(frontend, owner)
            if heir is not None:
                winners[heir] = None
        for frontend in after:
            if frontend not in kept:
                loser = self._claims.claim(frontend, owner, after[frontend].trust)
                if loser is not None:
                    losers[loser] = None
        if new is not None:
            self._states[owner] = new
        elif old is not None:
            self._states[owner] = replace(old, plan={})
        if new is None and owner in self._states:
            self._shed(owner, self._states.pop(owner), delta)
        self._settle_claims(losers, winners, delta)

    def _settle_claims(self, losers: Mapping[Owner, None], winners: Mapping[Owner, None], delta: Delta) -> None:
        for each in losers:
            self._shed(each, self._states.get(each), delta)
        for each in {**losers, **winners}:
            if each in self._states:
                self._fill(each, self._states[each], delta)

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
                    self._listed.unlist(backend)

    def _grouped(self, owner: Owner, state: _State) -> dict[tuple[PortKey, bool], dict[FrontendKey, Want]]:
        """The frontends that are planned and won, by the group they belong to."""
        grouped: dict[tuple[PortKey, bool], dict[FrontendKey, Want]] = {}
        for frontend, want in state.plan.items():
            if self._claims.holder(frontend) == owner:
                grouped.setdefault((want.port, want.local), {})[frontend] = want
                if want.flags & front.TWO_SCOPES:
                    inside = Want(want.port, False, want.flags & ~front.OUTSIDE_ONLY)
                    grouped.setdefault((want.port, False), {})[frontend._replace(scope=front.SCOPE_INTERNAL)] = inside
        return grouped

    def _dissolve(self, group: Group, delta: Delta) -> None:
        group.dissolve(delta)
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
                group.set_affinity(0, delta)
            self._arrange(members, group, local, None, delta)
            group.set_affinity(state.service.affinity_seconds, delta)
            limited = any(want.flags & front.SOURCE_RANGES for want in frontends.values())
            group.admit(front.ranges(state.service, port.v4) if limited else frozenset(), delta)
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

    # --- endpoints -----------------------------------------------------------------------------------------------

    def _relist(self, state: _State, port: PortKey, members: Members, delta: Delta) -> None:
        """All listings anew: whatever decides about standings may have changed."""
        former, weights = members.standings, dict[int, int]()
        now = members.clear()
        for found, weight in self._listings(state, port):
            for key, stands in found:
                backend, least = self.backends.take(key), 0
                if backend in now:
                    members.add(backend, stands)
                    least = weights.get(backend, DEFAULT_WEIGHT)
                else:
                    now[backend] = stands
                    if backend not in former:
                        self._listed.list(backend, key, delta)
                if weight != DEFAULT_WEIGHT or backend in weights:
                    weights[backend] = max(weight, least)
        members.recount(weights)
        for backend in former.keys() - now.keys() if former else ():
            self._listed.unlist(backend)

    def _refresh(self, state: _State, former: dict[str, EndpointSlice], delta: Delta) -> None:
        """Only slices changed: only what differs in them is looked at."""
        now = state.slices
        changed: list[tuple[EndpointSlice | None, EndpointSlice | None]] = [
            (s, now.get(name)) for name, s in former.items() if now.get(name) is not s and now.get(name) != s
        ]
        changed += [(None, s) for name, s in now.items() if name not in former]
        if not changed:
            return
        differing = [_differing(old, new) for old, new in changed]
        weighed = any(s.weight != DEFAULT_WEIGHT for slices in (former, now) for s in slices.values())
        for port, members in state.members.items():
            touched: list[int] = []
            if weighed:
                self._relist(state, port, members, delta)
            else:
                for (old, new), (gone, come) in zip(changed, differing, strict=True):
                    before = self._contributions(state, port, old, gone)
                    touched += self._exchange(members, before, self._contributions(state, port, new, come), delta)
                if not touched:
                    continue
            stable = members.decide()
            for local, group in members.groups.items():
                moved = not touched or (group.serves ^ members.wanted(local)) & stable
                self._arrange(members, group, local, None if moved else touched, delta)
                self._finish(members, group, local, delta)

    def _exchange(self, members: Members, before: list[Listing], after: list[Listing], delta: Delta) -> Iterator[int]:
        """Some listings in the place of others. Yields the backends that it is about."""
        for key, stands in before:
            backend = self.backends.take(key)
            yield backend
            if members.remove(backend, stands):
                self._listed.unlist(backend)
        for key, stands in after:
            backend = self.backends.take(key)
            yield backend
            if members.add(backend, stands):
                self._listed.list(backend, key, delta)

    def _listings(self, state: _State, port: PortKey) -> Iterator[tuple[list[Listing], int]]:
        for slice_ in state.slices.values():
            yield self._contributions(state, port, slice_, slice_.endpoints), slice_.weight
        if state.extras:
            yield [(Backend(*key), _SERVES) for key in state.extras[port.port].backends], DEFAULT_WEIGHT

    def _contributions(
        self, state: _State, key: PortKey, slice_: EndpointSlice | None, endpoints: Iterable[Endpoint]
    ) -> list[Listing]:
        """What some endpoints of a slice are for a port."""
        found: list[Listing] = []
        if slice_ is None or slice_.v4 != key.v4:
            return found
        name, proto = state.ports[key].name, key.proto
        publish, drained = state.service.publish_not_ready, slice_.weight == 0
        known = self._standings.setdefault((publish, drained), {})
        for number in [p.port for p in slice_.ports if p.name == name and p.proto == proto]:
            for endpoint in endpoints:
                # What is asked for every endpoint of the cluster has few answers: by all there is but the address.
                stands = known.get(endpoint[1:])
                if stands is None:
                    if len(known) >= MAX_KNOWN:
                        known.clear()  # nodes come and go
                    stands = standing(endpoint, self.place, publish_not_ready=publish, drained=drained)
                    known[endpoint[1:]] = stands
                found.append((_new(Backend, (endpoint[0], number, proto, 0)), stands))
        return found

    # --- slots and frontends -------------------------------------------------------------------------------------

    def _arrange(
        self, members: Members, group: Group, local: bool, touched: Iterable[int] | None, delta: Delta
    ) -> None:
        """Bring the slots up to date; `touched` None: every endpoint may serve or not serve now."""
        if touched is None:
            members.decide()
            touched = members.standings if group.fresh and not group.order else (*group.order, *members.standings)
            self._losing.add(group.number)
        elif not all(members.standings.get(b, 0) & ALIVE for b in touched):
            self._losing.add(group.number)
        group.arrange(members.standings, members.wanted(local), touched, delta)

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
        group.set_table(members.weights if tabled else None, delta)


def _differing(old: EndpointSlice | None, new: EndpointSlice | None) -> tuple[Sequence[Endpoint], Sequence[Endpoint]]:
    """The endpoints of two versions of a slice, without those that both begin and end with: mostly one is left."""
    before = old.endpoints if old is not None else ()
    after = new.endpoints if new is not None else ()
    if old is None or new is None or (old.v4, old.ports, old.weight) != (new.v4, new.ports, new.weight):
        return before, after
    least = min(len(before), len(after))
    start = next((i for i in range(least) if before[i] != after[i]), least)
    end = next((i for i in range(least - start) if before[~i] != after[~i]), least - start)
    return before[start : len(before) - end], after[start : len(after) - end]


def _addresses(state: _State | None) -> dict[bytes, int]:
    return front.service_addresses(state.service) if state is not None and state.plan else {}


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
