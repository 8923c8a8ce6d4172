"""The policy compiler: policies, identities and local endpoints in; shared policy sets out. Pure and synchronous.

Rules
- The inputs (`upsert_*`, `delete_*`) only mark what they could change. `changes()` does the work and says what changed
  since it was last called; questions are about the state as of then.
- Endpoints selected by the same specs share one set, whose key names these specs. A changed spec changes the set in
  place; an endpoint that another spec selects moves to another set.
- Only specs that select a local endpoint are compiled, get rule numbers, and have their prefixes known on this node.
- The outcome depends on the inputs that are in force, never on the order in which they came.

To apply: new sets and entries before new `cidrs`, and `cidrs` before endpoints; in reverse when they go. An address
whose prefix is more specific than the entries know would otherwise lose what the wider prefix allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from fimbria.compute.policy_cidrs import CidrIndex
from fimbria.compute.policy_set import ANY_PEER, PolicySet, SetKey, Unit, UnitId, compile_unit
from fimbria.compute.policy_shapes import NO_PORTS, Ports, Shape
from fimbria.compute.selectors import SelectorCache
from fimbria.model.address import Prefix
from fimbria.model.identity import SCOPE_CIDR
from fimbria.model.labels import Labels
from fimbria.model.policy import CidrBlock, Direction, Origin, Policy, PolicyId, PolicySpec, Selector
from fimbria.model.rows import Cidr, PolicyEntry, PolicyKey, PrefixKey

_EMPTY: Shape = {}


@dataclass(frozen=True, slots=True)
class EndpointPolicy:
    """What an endpoint's row says about policy: its set (None: no policy selects it) and `enum endpoint_flag` bits."""

    set: SetKey | None = None
    flags: int = 0


@dataclass(frozen=True, slots=True)
class SetChange:
    """Entries of one set that are new or different, and keys that are gone. `created`: the set wasn't there before."""

    upserts: dict[PolicyKey, PolicyEntry]
    deletes: frozenset[PolicyKey]
    created: bool = False


@dataclass(frozen=True, slots=True)
class Changes:
    """Since the last call. `endpoints` are those whose `EndpointPolicy` differs; a None in `cidrs` is a deletion."""

    sets: dict[SetKey, SetChange] = field(default_factory=dict)
    gone: frozenset[SetKey] = frozenset()
    endpoints: frozenset[str] = frozenset()
    cidrs: dict[PrefixKey, Cidr | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.sets or self.gone or self.endpoints or self.cidrs)


@dataclass(frozen=True, slots=True)
class _Endpoint:
    labels: Labels
    ports: Ports


class PolicyEngine:
    """`rule_id` numbers a rule by where it is written, `cidr_id` a prefix (1..2^24-1); both must be stable."""

    def __init__(self, rule_id: Callable[[Origin], int], cidr_id: Callable[[Prefix], int]) -> None:
        self._rule_id = rule_id
        self._cidr_id = cidr_id
        self._policies: dict[PolicyId, Policy] = {}
        self._specs: dict[UnitId, PolicySpec] = {}
        self._units: dict[UnitId, Unit] = {}
        self._origins: dict[UnitId, dict[int, Origin]] = {}
        self._subjects: SelectorCache[Labels] = SelectorCache()
        self._units_by_subject: dict[Selector, set[UnitId]] = {}
        self._endpoints: dict[str, _Endpoint] = {}
        self._policy_of: dict[str, EndpointPolicy] = {}
        self._with_labels: dict[Labels, set[str]] = {}
        self._identities: SelectorCache[int] = SelectorCache()
        self._ports: dict[int, Ports] = {}
        self._cidrs = CidrIndex()
        self._numbers: dict[Prefix, int] = {}
        self._prefixes: dict[int, Prefix] = {}
        self._sets: dict[SetKey, PolicySet] = {}
        self._members: dict[SetKey, set[str]] = {}
        self._sets_of_unit: dict[UnitId, set[SetKey]] = {}
        self._sets_of_peer: dict[Selector | CidrBlock, set[SetKey]] = {}
        self._reset()

    def _reset(self) -> None:
        self._stale_endpoints: set[str] = set()
        self._stale_units: set[UnitId] = set()
        self._stale_peers: dict[SetKey, set[int]] = {}
        self._before: dict[SetKey, dict[int, Shape]] = {}
        self._endpoints_before: dict[str, EndpointPolicy] = {}
        self._cidrs_before: dict[Prefix, int | None] = {}
        self._sets_before: frozenset[SetKey] = frozenset(self._sets)

    # --- inputs: policies and local endpoints ---

    def upsert_policy(self, policy: Policy) -> None:
        self._set_policy(policy.id, policy)

    def delete_policy(self, policy: PolicyId) -> None:
        """Unknown ones are fine."""
        self._set_policy(policy, None)

    def _set_policy(self, policy_id: PolicyId, policy: Policy | None) -> None:
        old = self._policies.pop(policy_id, None)
        if policy is not None:
            self._policies[policy_id] = policy
        old_specs, specs = (old.specs if old else ()), (policy.specs if policy else ())
        for index in range(max(len(old_specs), len(specs))):
            before = old_specs[index] if index < len(old_specs) else None
            after = specs[index] if index < len(specs) else None
            if before != after:
                self._set_spec((policy_id, index), before, after)

    def _set_spec(self, unit: UnitId, before: PolicySpec | None, after: PolicySpec | None) -> None:
        self._stale_units.add(unit)
        self._units.pop(unit, None)
        if after is not None:
            self._specs[unit] = after
            self._subjects.add_selector(after.subject)
            self._units_by_subject.setdefault(after.subject, set()).add(unit)
            self._select_again(after.subject)
        if before is not None:
            self._select_again(before.subject)
            if after is None or after.subject != before.subject:
                self._units_by_subject[before.subject].discard(unit)
                if not self._units_by_subject[before.subject]:
                    del self._units_by_subject[before.subject]
            self._subjects.remove_selector(before.subject)
        if after is None:
            del self._specs[unit]

    def _select_again(self, subject: Selector) -> None:
        for labels in self._subjects.members(subject):
            self._stale_endpoints |= self._with_labels[labels]

    def upsert_endpoint(self, endpoint: str, labels: Mapping[str, str], ports: Ports = NO_PORTS) -> None:
        """A local pod with all its sourced labels (who is selected needn't depend on identity) and its ports."""
        new = _Endpoint(Labels(labels), ports)
        old = self._endpoints.get(endpoint)
        if old == new:
            return
        if old is not None and old.labels != new.labels:
            self._leave(endpoint, old.labels)
        self._endpoints[endpoint] = new
        self._with_labels.setdefault(new.labels, set()).add(endpoint)
        self._subjects.set(new.labels, new.labels)
        self._stale_endpoints.add(endpoint)

    def delete_endpoint(self, endpoint: str) -> None:
        """Unknown ones are fine."""
        old = self._endpoints.pop(endpoint, None)
        if old is not None:
            self._leave(endpoint, old.labels)
            self._stale_endpoints.add(endpoint)

    def _leave(self, endpoint: str, labels: Labels) -> None:
        self._with_labels[labels].discard(endpoint)
        if not self._with_labels[labels]:
            del self._with_labels[labels]
            self._subjects.delete(labels)

    # --- inputs: identities ---

    def upsert_identity(self, number: int, labels: Labels) -> None:
        """An identity anywhere in the cluster, also the reserved ones (`RESERVED_LABELS`)."""
        self._peer_changed(number, self._identities.set(number, labels))

    def delete_identity(self, number: int) -> None:
        """Unknown ones are fine."""
        self._peer_changed(number, self._identities.delete(number))

    def set_identity_ports(self, number: int, ports: Ports) -> None:
        """The container ports of all pods with an identity, for egress rules that name ports; none forgets them."""
        if self._ports.get(number, NO_PORTS) == ports:
            return
        if ports:
            self._ports[number] = ports
        else:
            self._ports.pop(number, None)
        self._peer_changed(number, self._identities.matching(number))

    def _peer_changed(self, number: int, through: Iterable[Selector | CidrBlock]) -> None:
        for peer in through:
            for key in self._sets_of_peer.get(peer, ()):
                self._stale_peers.setdefault(key, set()).add(number)

    # --- outputs ---

    def changes(self) -> Changes:
        """Bring everything up to date and say what changed since the last call."""
        self._assign()
        self._reload()
        for key, numbers in self._stale_peers.items():
            if key in self._sets:
                self._refresh(self._sets[key], numbers)
        result = self._collect()
        self._reset()
        return result

    def endpoint(self, endpoint: str) -> EndpointPolicy:
        """Raises KeyError for an endpoint that isn't there."""
        return self._policy_of[endpoint]

    def policy_set(self, key: SetKey) -> PolicySet:
        """Raises KeyError for a set that no endpoint uses."""
        return self._sets[key]

    def sets(self) -> Mapping[SetKey, PolicySet]:
        return self._sets

    def cidrs(self) -> dict[PrefixKey, Cidr]:
        """The whole `cidrs` map of this node."""
        return {_row(prefix): Cidr(number) for prefix, number in self._numbers.items()}

    def origins(self) -> set[Origin]:
        """The rules in force on this node: numbers of all others can be given back once this is applied."""
        return {origin for origins in self._origins.values() for origin in origins.values()}

    def prefixes(self) -> set[Prefix]:
        """The prefixes known on this node: likewise."""
        return set(self._numbers)

    def explain(self, rule: int) -> Origin | None:
        """Where the rule with this number is written; None if no rule in force on this node has it."""
        return next((origins[rule] for origins in self._origins.values() if rule in origins), None)

    def denying(self, endpoint: str, direction: Direction) -> list[PolicyId]:
        """The policies that make denied the default for an endpoint. Raises KeyError if it isn't there."""
        key = self._policy_of[endpoint].set
        units = key.units if key else ()
        return sorted({unit[0] for unit in units if direction in self._units[unit].default_deny})

    # --- inside: endpoints to sets ---

    def _assign(self) -> None:
        emptied: set[SetKey] = set()
        for endpoint in sorted(self._stale_endpoints):
            before = self._policy_of.get(endpoint)
            key = self._key_for(endpoint) if endpoint in self._endpoints else None
            old = before.set if before else None
            if old != key and old is not None:
                self._members[old].discard(endpoint)
                emptied.add(old)
            if key is not None:
                if key not in self._sets:
                    self._create(key)
                self._members[key].add(endpoint)
            self._point(endpoint, key)
        for key in emptied:
            if not self._members[key]:
                self._drop(key)

    def _key_for(self, endpoint: str) -> SetKey | None:
        row = self._endpoints[endpoint]
        subjects = self._subjects.matching(row.labels)
        units = sorted(unit for subject in subjects for unit in self._units_by_subject[subject])
        if not units:
            return None
        names = {name for unit in units for name in self._unit(unit).local_names}
        return SetKey(tuple(units), tuple(sorted(port for port in row.ports if port[:2] in names)))

    def _unit(self, unit: UnitId) -> Unit:
        compiled = self._units.get(unit)
        if compiled is None:
            spec = self._specs[unit]
            compiled = self._units[unit] = compile_unit(spec, self._rule_id)
            self._origins[unit] = {self._rule_id(rule.origin): rule.origin for rule in spec.rules}
        return compiled

    def _point(self, endpoint: str, key: SetKey | None) -> None:
        """Let an endpoint's row say what holds now."""
        before = self._policy_of.pop(endpoint, EndpointPolicy())
        self._endpoints_before.setdefault(endpoint, before)
        if endpoint in self._endpoints:
            self._policy_of[endpoint] = EndpointPolicy(key, self._sets[key].flags if key else 0)

    # --- inside: sets ---

    def _create(self, key: SetKey) -> None:
        policy_set = self._sets[key] = PolicySet(key)
        self._members[key] = set()
        for unit in key.units:
            self._sets_of_unit.setdefault(unit, set()).add(key)
        policy_set.load(self._unit(unit) for unit in key.units)
        self._speak(key, policy_set.peers)
        self._rebuild(policy_set)

    def _drop(self, key: SetKey) -> None:
        policy_set = self._sets.pop(key)
        del self._members[key]
        self._stale_peers.pop(key, None)
        self._before.pop(key, None)
        for unit in key.units:
            self._sets_of_unit[unit].discard(key)
            if not self._sets_of_unit[unit]:
                del self._sets_of_unit[unit]
                self._units.pop(unit, None)
                self._origins.pop(unit, None)
        self._fall_silent(key, policy_set.peers)

    def _reload(self) -> None:
        """Sets that were there before and contain a changed spec."""
        keys = {key for unit in self._stale_units for key in self._sets_of_unit.get(unit, ())}
        for key in sorted(keys & self._sets_before):
            policy_set = self._sets[key]
            peers = list(policy_set.peers)
            policy_set.load(self._unit(unit) for unit in key.units)
            self._speak(key, policy_set.peers)
            self._fall_silent(key, peers, policy_set)
            self._rebuild(policy_set)
            for endpoint in self._members[key]:
                self._point(endpoint, key)

    def _speak(self, key: SetKey, peers: Iterable[Selector | CidrBlock]) -> None:
        for peer in peers:
            self._sets_of_peer.setdefault(peer, set()).add(key)
            if isinstance(peer, Selector):
                self._identities.add_selector(peer)
            else:
                for prefix in self._cidrs.add(peer):
                    self._name(prefix)

    def _fall_silent(self, key: SetKey, peers: Iterable[Selector | CidrBlock], now: PolicySet | None = None) -> None:
        """The reverse of `_speak`, but a set that speaks of the peer anew stays noted."""
        for peer in peers:
            if now is None or not now.speaks_of(peer):
                self._sets_of_peer[peer].discard(key)
                if not self._sets_of_peer[peer]:
                    del self._sets_of_peer[peer]
            if isinstance(peer, Selector):
                self._identities.remove_selector(peer)
            else:
                for prefix in self._cidrs.remove(peer):
                    self._unname(prefix)

    def _name(self, prefix: Prefix) -> None:
        number = SCOPE_CIDR | self._cidr_id(prefix)
        self._cidrs_before.setdefault(prefix, None)
        self._numbers[prefix] = number
        self._prefixes[number] = prefix
        self._peer_changed(number, self._cidrs.covering(prefix))

    def _unname(self, prefix: Prefix) -> None:
        number = self._numbers.pop(prefix)
        self._cidrs_before.setdefault(prefix, number)
        del self._prefixes[number]
        self._peer_changed(number, self._cidrs.covering(prefix))

    # --- inside: entries ---

    def _rebuild(self, policy_set: PolicySet) -> None:
        which: dict[int, list[int]] = {}
        for index, peer in enumerate(policy_set.peers):
            for number in self._numbers_of(peer):
                which.setdefault(number, []).append(index)
        ports, nothing = self._ports, NO_PORTS
        shapes = {n: policy_set.shape_at(tuple(at), ports.get(n, nothing)) for n, at in which.items()}
        shapes[ANY_PEER] = policy_set.anyone()
        new = {number: shape for number, shape in shapes.items() if shape}
        if policy_set.key in self._sets_before:
            for number in policy_set.shapes.keys() | new.keys():
                self._remember(policy_set, number, new.get(number, _EMPTY))
        policy_set.shapes = new

    def _numbers_of(self, peer: Selector | CidrBlock) -> Iterable[int]:
        if isinstance(peer, Selector):
            return self._identities.members(peer)
        return [self._numbers[prefix] for prefix in self._cidrs.inside(peer)]

    def _refresh(self, policy_set: PolicySet, numbers: Iterable[int]) -> None:
        for number in numbers:
            shape = policy_set.shape(self._matching(number), self._ports.get(number, NO_PORTS))
            self._remember(policy_set, number, shape)
            if shape:
                policy_set.shapes[number] = shape
            else:
                policy_set.shapes.pop(number, None)

    def _matching(self, number: int) -> Iterable[Selector | CidrBlock]:
        if number < SCOPE_CIDR:
            return self._identities.matching(number)
        prefix = self._prefixes.get(number)
        return self._cidrs.covering(prefix) if prefix is not None else ()

    def _remember(self, policy_set: PolicySet, number: int, new: Shape) -> None:
        old = policy_set.shapes.get(number, _EMPTY)
        if old is not new and old != new:
            self._before.setdefault(policy_set.key, {}).setdefault(number, old)

    def _collect(self) -> Changes:
        sets = {key: _created(self._sets[key]) for key in self._sets if key not in self._sets_before}
        for key, shapes in self._before.items():
            if key in self._sets_before and key in self._sets:
                change = _difference(self._sets[key], shapes)
                if change.upserts or change.deletes:
                    sets[key] = change
        endpoints = {
            name
            for name, before in self._endpoints_before.items()
            if self._policy_of.get(name, EndpointPolicy()) != before
        }
        cidrs = {
            _row(prefix): Cidr(self._numbers[prefix]) if prefix in self._numbers else None
            for prefix, before in self._cidrs_before.items()
            if self._numbers.get(prefix) != before
        }
        return Changes(sets, frozenset(self._sets_before - self._sets.keys()), frozenset(endpoints), cidrs)


def _row(prefix: Prefix) -> PrefixKey:
    return PrefixKey(prefix.length, prefix.addr)


def _created(policy_set: PolicySet) -> SetChange:
    return SetChange(policy_set.entries(), frozenset(), created=True)


def _difference(policy_set: PolicySet, before: Mapping[int, Shape]) -> SetChange:
    upserts: dict[PolicyKey, PolicyEntry] = {}
    deletes: set[PolicyKey] = set()
    for number, old in before.items():
        new = policy_set.shapes.get(number, _EMPTY)
        for cell, entry in new.items():
            if old.get(cell) != entry:
                upserts[PolicyKey(cell.prefixlen, number, cell.direction, cell.proto, cell.port)] = PolicyEntry(*entry)
        for cell in old.keys() - new.keys():
            deletes.add(PolicyKey(cell.prefixlen, number, cell.direction, cell.proto, cell.port))
    return SetChange(upserts, frozenset(deletes))
