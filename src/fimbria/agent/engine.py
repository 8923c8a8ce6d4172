"""From tables to desired rows: drains what changed, asks the pure compute parts, and puts the rows they answer.

Everything here is synchronous: a step sees all tables at one instant and leaves all rows consistent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from fimbria.agent.local_frontends import LocalFrontends
from fimbria.apply.attach import DeviceHook
from fimbria.apply.policy_sets import SetContent
from fimbria.apply.rows import Rows
from fimbria.apply.xdp import PROGRAM as XDP_PROGRAM
from fimbria.apply.xdp import XdpHook
from fimbria.compute import network
from fimbria.compute.identity_ports import IdentityPorts, ports_of
from fimbria.compute.ipcache import IpcacheCompute
from fimbria.compute.policy import PolicyEngine, SetChange
from fimbria.compute.policy_set import ENFORCE, SetKey
from fimbria.compute.service import Delta as ServiceDelta
from fimbria.compute.service import ServiceCompute
from fimbria.compute.service_frontends import Defaults
from fimbria.compute.service_rows import MAPS
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix, unpack
from fimbria.model.endpoint import EndpointIdentity, LocalEndpoint, RemoteEndpoint
from fimbria.model.identity import MIN_ALLOCATED, RESERVED_LABELS, SCOPE_CIDR, Reserved
from fimbria.model.labels import Labels, pod_labels
from fimbria.model.network import DeviceSet, NeighbourKey, Route
from fimbria.model.node import Node
from fimbria.model.policy import Policy, PolicyId
from fimbria.model.rows import Cidr, Endpoint, ExemptKey, FrontendKey, LocalAddr, PrefixKey, Remote
from fimbria.model.service import NodeTopology, ServiceKey, TableContent
from fimbria.tables import ObjectKey, Tables
from fimbria.tables.table import Changes

log = logging.getLogger(__name__)

ENDPOINT_READY: Final = 1
ENFORCE_BOTH: Final = sum(ENFORCE.values())
SPARE_NUMBERS: Final = 1024
API_SERVICE: Final = ServiceKey("default", "kubernetes")
POLICY_TABLES: Final = ("network_policies", "cilium_policies", "clusterwide_policies")


@dataclass(slots=True)
class DesiredRows:
    """All desired rows of a node, one member a target."""

    sysctls: Rows[str, str] = field(default_factory=lambda: Rows("sysctls"))
    backends: Rows[int, Any] = field(default_factory=lambda: Rows("backends"))
    service_members: Rows[Any, int] = field(default_factory=lambda: Rows("service_members"))
    source_ranges: Rows[Any, int] = field(default_factory=lambda: Rows("source_ranges"))
    service_exempt: Rows[ExemptKey, int] = field(default_factory=lambda: Rows("service_exempt"))
    service_tables: Rows[int, TableContent] = field(default_factory=lambda: Rows("service_tables"))
    service_slots: Rows[Any, int] = field(default_factory=lambda: Rows("service_slots"))
    frontends: Rows[Any, Any] = field(default_factory=lambda: Rows("frontends"))
    ipcache: Rows[PrefixKey, Remote] = field(default_factory=lambda: Rows("ipcache"))
    policy_sets: Rows[int, SetContent] = field(default_factory=lambda: Rows("policy_sets"))
    identities: Rows[int, int] = field(default_factory=lambda: Rows("identities"))
    cidrs: Rows[PrefixKey, Cidr] = field(default_factory=lambda: Rows("cidrs"))
    device_links: Rows[DeviceHook, str] = field(default_factory=lambda: Rows("device_links"))
    xdp_links: Rows[XdpHook, str] = field(default_factory=lambda: Rows("xdp_links"))
    socket_links: Rows[str, str] = field(default_factory=lambda: Rows("socket_links"))
    neighbours: Rows[NeighbourKey, bytes] = field(default_factory=lambda: Rows("neighbours"))
    next_hops: Rows[NeighbourKey, bool] = field(default_factory=lambda: Rows("next_hops"))
    endpoints: Rows[int, Endpoint] = field(default_factory=lambda: Rows("endpoints"))
    local_addrs: Rows[bytes, LocalAddr] = field(default_factory=lambda: Rows("local_addrs"))
    routes: Rows[Prefix, Route] = field(default_factory=lambda: Rows("routes"))


@dataclass(slots=True)
class NumberBook:
    """Every kind of number the agent gives out; saved so that they mean the same after a restart."""

    rules: Numbers[str] = field(default_factory=lambda: Numbers("policy rules"))
    cidrs: Numbers[str] = field(default_factory=lambda: Numbers("CIDR identities", 1, (1 << 24) - 1))
    sets: Numbers[str] = field(default_factory=lambda: Numbers("policy sets"))
    services: Numbers[Any] = field(default_factory=lambda: Numbers("service ports"))
    backends: Numbers[Any] = field(default_factory=lambda: Numbers("backends"))

    def restore(self, saved: Mapping[str, Any]) -> None:
        """From the journal; services and backends are restored from the kernel."""
        for name in ("rules", "cidrs", "sets"):
            rows = saved.get(name)
            if isinstance(rows, dict):
                getattr(self, name).restore((k, n) for k, n in rows.items() if isinstance(n, int))

    def save(self) -> dict[str, Any]:
        """For the journal."""
        return {name: dict(getattr(self, name).items()) for name in ("rules", "cidrs", "sets")}


class Engine:
    """Owns the compute state of one node. `labels_of` decides which labels count for identity."""

    def __init__(
        self,
        tables: Tables,
        rows: DesiredRows,
        numbers: NumberBook,
        *,
        node: str,
        cluster: str,
        overlay: bool,
        services: Defaults = Defaults(),  # noqa: B008 frozen
        xdp: str = "disabled",
    ) -> None:
        self.tables = tables
        self.rows = rows
        self.numbers = numbers
        self.cluster = cluster
        self.node = node
        self.xdp = xdp
        self.on_services: Callable[[], None] = lambda: None
        self.on_labels: Callable[[int, Mapping[str, str]], None] = lambda _endpoint_id, _labels: None
        self.devices: DeviceSet | None = None
        self.api_servers: frozenset[FrontendKey] = frozenset()
        self.ipcache = IpcacheCompute(node, overlay)
        self.policy = PolicyEngine(
            lambda origin: numbers.rules.take(str(origin)), lambda prefix: numbers.cidrs.take(str(prefix))
        )
        self.services = ServiceCompute(node, numbers.services, numbers.backends, services)
        self.local = LocalFrontends(
            tables, rows.service_exempt, self.services, self.put_services,
            addrs=self._node_addrs, labels=self.labels, held=self._held,
        )  # fmt: skip
        self._policies_of: dict[tuple[str, Any], PolicyId] = {}
        self._networks: dict[tuple[str, Any], tuple[tuple[Prefix, Route], ...]] = {}
        self._routes_to: dict[Prefix, dict[tuple[str, Any], Route]] = {}
        self._identity_ports = IdentityPorts()
        self._service_of_slice: dict[ObjectKey, ServiceKey] = {}
        self._set_keys: dict[int, SetKey] = {}
        self._decided: dict[int, EndpointIdentity] = {}
        self._pending: set[int] = set()
        self._known: dict[int, LocalEndpoint] = {}
        self._own: Node | None = None
        self.changes = Changes(getattr(tables, f) for f in tables.__slots__)
        for number, labels in RESERVED_LABELS.items():
            self.policy.upsert_identity(number, labels)
        tables.pods.add_index("namespace", lambda p: (p.namespace,))
        tables.pods.add_index("address", lambda p: () if p.host_network else p.addrs)
        tables.endpoints.add_index("namespace", lambda e: (e.namespace,) if e.namespace else ())
        tables.endpoints.add_index("pod", lambda e: ((e.namespace, e.pod),) if e.pod else ())
        tables.endpoints.add_index("owner", lambda e: (e.owner,))
        tables.endpoint_slices.add_index("service", lambda s: (s.service,))

    # --- one step --------------------------------------------------------------------------------------------------

    def step(self) -> bool:
        """Compute everything that changed since the last step. True if anything did."""
        dirty = self.changes.drain()
        if not dirty:
            return False
        self._identities(dirty.get("identities", ()))
        for name in POLICY_TABLES:
            self._policies(name, dirty.get(name, ()))
        # Nodes first: where a pod is follows from whose block its address is in.
        self._nodes(dirty.get("nodes", ()))
        self._remotes(dirty.get("remote_endpoints", ()))
        self._topology(dirty)
        self._services(dirty.get("services", ()), dirty.get("endpoint_slices", ()))
        touched = self._touched_endpoints(dirty)
        self._locals(touched)
        self.local.step(dirty, touched)
        self._apply_policy()
        return True

    def set_devices(self, devices: DeviceSet) -> None:
        """The node's devices are known, or changed: everything that names them is computed again."""
        former, self.devices = self.devices, devices
        if former is not None:
            for ifindex in {former.overlay, *former.uplinks} - {devices.overlay, *devices.uplinks}:
                self._drop_hooks(ifindex)
                self.rows.xdp_links.drop(XdpHook(ifindex, self.xdp))
            if former.overlay != devices.overlay:
                self.rows.neighbours.drop_many(key for key, _ in network.overlay_neighbours(former))
        self._nodes(set(self.tables.nodes))
        self._locals(set(self.tables.endpoints))
        self._device_hooks()
        for key, mac in network.overlay_neighbours(devices):
            self.rows.neighbours.put(key, mac)

    def own_node(self) -> Node | None:
        """This node as it was last seen with pod addresses. Its object may be deleted; the node is still there."""
        seen = self.tables.nodes.get(self.node)
        if seen is not None and (seen.pod_cidrs or self._own is None or not self._own.pod_cidrs):
            self._own = seen
        return self._own

    def labels(self, endpoint: LocalEndpoint) -> Mapping[str, str] | None:
        """All labels of a local endpoint's pod; None while its pod or namespace is unknown."""
        pod = self.tables.pods.get((endpoint.namespace, endpoint.pod))
        namespace = self.tables.namespaces.get(endpoint.namespace)
        if pod is None or namespace is None or not pod.is_of(endpoint.uid):
            return None
        return pod_labels(endpoint.namespace, pod.labels, namespace, pod.service_account, self.cluster)

    # --- identities and policies -------------------------------------------------------------------------------------

    def _identities(self, keys: Iterable[int]) -> None:
        for number in keys:
            if MIN_ALLOCATED <= number < SCOPE_CIDR:
                self._identity(number)

    def _identity(self, number: int) -> None:
        """Compile an identity, and say so: only then may it talk to pods that policies select."""
        seen = self.tables.identities.get(number)
        # A pod's own node needn't wait for the cluster to tell it what it decided itself.
        own = (d.labels for d in self._decided.values() if d.number == number) if seen is None else ()
        labels = seen.labels if seen is not None else next(iter(own), None)
        if labels is None:
            self.policy.delete_identity(number)
            self.rows.identities.drop(number)
        else:
            self.policy.upsert_identity(number, Labels(labels))
            self.rows.identities.put(number, 1)

    def _decide(self, endpoint_id: int, decided: EndpointIdentity | None) -> None:
        """A local endpoint has this identity now, or none."""
        former = self._decided.pop(endpoint_id, None)
        if decided is not None:
            self._decided[endpoint_id] = decided
        if former != decided:
            self._identities({d.number for d in (former, decided) if d is not None})

    def failed_sets_about(self, identity: int) -> list[int]:
        """The policy sets that say something about an identity but couldn't be written."""
        failed = (n for n in self.rows.policy_sets.failed if n in self._set_keys)
        return [n for n in failed if identity in self.policy.policy_set(self._set_keys[n]).shapes]

    def _policies(self, table: str, keys: Iterable[Any]) -> None:
        for key in keys:
            policy: Policy | None = getattr(self.tables, table).get(key)
            known = self._policies_of.pop((table, key), None)
            if policy is None:
                if known is not None:
                    self.policy.delete_policy(known)
                continue
            self._policies_of[table, key] = policy.id
            self.policy.upsert_policy(policy)

    def _apply_policy(self) -> None:
        for number, ports in self._identity_ports.changes():
            self.policy.set_identity_ports(number, ports)
        changes = self.policy.changes()
        for key, change in changes.sets.items():
            self._set_content(key, change)
        for prefix, cidr in changes.cidrs.items():
            if cidr is None:
                self.rows.cidrs.drop(prefix)
            else:
                self.rows.cidrs.put(prefix, cidr)
        for endpoint_id in changes.endpoints:
            self._endpoint_row(int(endpoint_id))
        for key in changes.gone:
            number = self.numbers.sets.release(str(key)) or 0
            self._set_keys.pop(number, None)
            self.rows.policy_sets.drop(number)
        self._give_back()

    def _set_content(self, key: SetKey, change: SetChange) -> None:
        number = self.numbers.sets.take(str(key))
        self._set_keys[number] = key
        before = None if change.created else self.rows.policy_sets.desired.get(number)
        if before is None:
            self.rows.policy_sets.put(number, SetContent(self.policy.policy_set(key).entries()))
        else:
            self.rows.policy_sets.put(number, before.derive(change.upserts, change.deletes))

    def _give_back(self) -> None:
        """Free the numbers of rules and prefixes that are gone, when half of them are: amortised, not per change."""
        for numbers, used in ((self.numbers.rules, self.policy.origins), (self.numbers.cidrs, self.policy.prefixes)):
            if len(numbers) > SPARE_NUMBERS:
                kept = {str(key) for key in used()}
                if len(numbers) > 2 * len(kept):
                    for key in [k for k, _ in numbers.items() if k not in kept]:
                        numbers.release(key)

    def set_number(self, key: SetKey | None) -> int:
        """The number of a policy set in the kernel; 0 for none."""
        return self.numbers.sets.take(str(key)) if key is not None else 0

    # --- addresses ---------------------------------------------------------------------------------------------------

    def _remotes(self, keys: Iterable[ObjectKey]) -> None:
        for key in keys:
            self._report(key, self.tables.remote_endpoints.get(key))

    def _report(self, key: ObjectKey, remote: RemoteEndpoint | None) -> None:
        told = self.ipcache.foreign.get(key)
        self._put_ipcache(self.ipcache.set_remote(key, remote))
        stranger = self.ipcache.foreign.get(key)
        if stranger is not None and remote is not None and stranger != told:
            log.warning(
                "CiliumEndpoint %s/%s is ignored: %s is in no pod block of node %s, whose agent wrote it",
                *key, unpack(stranger), remote.writer,
            )  # fmt: skip
        counts = remote if stranger is None else None
        self._identity_ports.put(key, counts.identity if counts else 0, counts.named_ports if counts else ())

    def _nodes(self, keys: Iterable[str]) -> None:
        keys = set(keys)
        moved: set[PrefixKey] = set()
        if self.node in keys:
            # Which addresses are our own decides about every report of a pod, and every route's source.
            own = self.own_node()
            known, place = self.ipcache.own_addrs, self.ipcache.place(self.node)
            self._put_ipcache(self.ipcache.set_node(self.node, own))
            if (known, place) != (self.ipcache.own_addrs, self.ipcache.place(self.node)):
                self._reports(None)
            keys |= set(self.tables.nodes)
            self._locals(set(self.tables.endpoints))
            self._api_servers()
        for name in keys:
            node = self.own_node() if name == self.node else self.tables.nodes.get(name)
            place = self.ipcache.place(name)
            changed = self.ipcache.set_node(name, node)
            self._put_ipcache(changed)
            if place != self.ipcache.place(name):
                moved |= changed
            self._networks_of(("node", name), tuple(self._node_routes(node)))
        if moved:
            self._reports(moved)

    def _reports(self, blocks: set[PrefixKey] | None) -> None:
        """What is known of pods in these blocks, or of all, is taken anew: their nodes are elsewhere now."""
        known = self.ipcache.known_pods(blocks, self.tables.remote_endpoints.items())
        for key, remote in known:
            self._report(key, remote)

    def host_addresses_changed(self) -> None:
        """`ipcache.host_addrs` are others than before."""
        self._nodes([self.node])

    def _node_routes(self, node: Node | None) -> Iterable[tuple[Prefix, Route]]:
        own = self.own_node()
        if node is None or own is None or self.devices is None:
            return ()
        if node.name == self.node:
            return network.own_block_routes(node)
        return network.remote_block_routes(node, own, self.devices)

    def _networks_of(self, source: tuple[str, Any], routes: tuple[tuple[Prefix, Route], ...]) -> None:
        old = self._networks.get(source, ())
        if old == routes:
            return
        if routes:
            self._networks[source] = routes
        else:
            self._networks.pop(source, None)
        for prefix, _ in old:
            self._routes_to[prefix].pop(source, None)
        for prefix, route in routes:
            self._routes_to.setdefault(prefix, {})[source] = route
        for prefix in {prefix for prefix, _ in (*old, *routes)}:
            self._route(prefix)

    def _route(self, prefix: Prefix) -> None:
        """Two nodes may claim a block for a while: this node's own pods and blocks win, and who goes takes only his."""
        claims = self._routes_to[prefix]
        if not claims:
            del self._routes_to[prefix]
            self.rows.routes.drop(prefix)
            return
        best = min(claims, key=lambda s: (s[0] != "endpoint", s[1] != self.node, str(s[1])))
        self.rows.routes.put(prefix, claims[best])

    def _put_ipcache(self, keys: Iterable[PrefixKey]) -> None:
        for key in keys:
            row = self.ipcache.get(key)
            if row is None:
                self.rows.ipcache.drop(key)
            else:
                self.rows.ipcache.put(key, row)

    # --- services ----------------------------------------------------------------------------------------------------

    def _services(self, services: Iterable[ObjectKey], slices: Iterable[ObjectKey]) -> None:
        keys = {ServiceKey(*key) for key in services}
        for key in slices:
            keys |= self._slice_services(key)
        if API_SERVICE in keys:
            self._api_servers()
        delta = ServiceDelta()
        # In one order, so that of several which claim a frontend the same one has it first after every start.
        order = sorted(keys)
        known = self.tables.services.get
        self.services.announce(((k, service) for k in order if (service := known(k)) is not None), delta)
        for service_key in order:
            found = (self.tables.endpoint_slices.get(k) for k in self.tables.endpoint_slices.by("service", service_key))
            service = self.tables.services.get(service_key)
            self.services.update(service_key, service, [s for s in found if s], delta)
        self.put_services(delta)

    def _node_addrs(self) -> tuple[bytes, ...]:
        """All addresses of this node that are known."""
        own, here = self.own_node(), self.tables.own_node.get(self.node)
        return ((*own.addrs, *own.routers) if own else ()) + (here.addrs if here else ())

    def is_spoken_for(self, addr: bytes) -> bool:
        """Whether a pod is said to have an address: by a report, or by the status of a pod of this node."""
        return self.ipcache.get(PrefixKey(128, addr)) is not None or bool(self.tables.pods.by("address", addr))

    def _held(self, addr: bytes) -> bool:
        """Whether a node or a pod has an address, or may get it."""
        if self.ipcache.get(PrefixKey(128, addr)) is not None:
            return True
        return any(addr in block for node in self.tables.nodes.values() for block in node.pod_cidrs)

    def _topology(self, dirty: Mapping[str, set[Any]]) -> None:
        """Where this node is, and which addresses are nodes' own."""
        if "own_node" in dirty:
            self.put_services(self.services.set_topology(self.tables.own_node.get(self.node) or NodeTopology()))
        if "nodes" in dirty:
            found = {name: self.tables.nodes.get(name) for name in dirty["nodes"]}
            addrs = {name: (*node.addrs, *node.routers) if node else () for name, node in found.items()}
            self.put_services(self.services.set_nodes(addrs))

    def put_services(self, delta: ServiceDelta) -> None:
        """Want what a change of Services, or of what others ask of them, brought about."""
        for name in MAPS:
            target: Rows[Any, Any] = getattr(self.rows, name)
            target.put_many(delta.upserts[name])
            target.drop_many(delta.deletes[name])
        self.on_services()

    def _api_servers(self) -> None:
        """Policies name the API servers as an entity: it is the endpoints of Service default/kubernetes."""
        # The slice that API servers keep themselves. Others are anybody's who may write to that namespace.
        kept = (API_SERVICE.namespace, API_SERVICE.name)
        slices = [k for k in self.tables.endpoint_slices.by("service", API_SERVICE) if k == kept]
        addrs = {e.addr for k in slices if (s := self.tables.endpoint_slices.get(k)) for e in s.endpoints}
        self._put_ipcache(self.ipcache.set_apiserver(addrs))
        ends = {
            FrontendKey(e.addr, p.port, p.proto)
            for k in slices for s in (self.tables.endpoint_slices.get(k),) if s for p in s.ports for e in s.endpoints
        }  # fmt: skip
        self.put_services(self.services.set_api_servers(ends | self.api_servers))
        here = bool(addrs & self.ipcache.own_addrs)
        labels = RESERVED_LABELS[Reserved.HOST]
        self.policy.upsert_identity(
            Reserved.HOST, Labels({**labels, "reserved:kube-apiserver": ""}) if here else labels
        )

    def _slice_services(self, key: ObjectKey) -> set[ServiceKey]:
        """The service a slice belongs to now, and the one it belonged to."""
        row = self.tables.endpoint_slices.get(key)
        known = self._service_of_slice.pop(key, None)
        if row is not None:
            self._service_of_slice[key] = row.service
        return {s for s in (known, row.service if row else None) if s is not None}

    # --- local endpoints ---------------------------------------------------------------------------------------------

    def _touched_endpoints(self, dirty: Mapping[str, set[Any]]) -> set[int]:
        touched: set[int] = set(dirty.get("endpoints", ())) | set(dirty.get("endpoint_identities", ()))
        for pod in dirty.get("pods", ()):
            touched |= self.tables.endpoints.by("pod", pod)
        for namespace in dirty.get("namespaces", ()):
            touched |= self.tables.endpoints.by("namespace", namespace)
        return touched

    def _locals(self, ids: Iterable[int]) -> None:
        for endpoint_id in ids:
            endpoint = self.tables.endpoints.get(endpoint_id)
            decided = self.tables.endpoint_identities.get(endpoint_id)
            identity = decided.number if decided else 0
            self._put_ipcache(self.ipcache.set_local(endpoint_id, endpoint, identity))
            self._decide(endpoint_id, decided if endpoint is not None else None)
            if endpoint is None:
                self._forget(endpoint_id)
                continue
            labels = self.labels(endpoint)
            pod = self.tables.pods.get((endpoint.namespace, endpoint.pod))
            ports = pod.named_ports if pod else ()
            self._identity_ports.put(("local", endpoint_id), identity, ports)
            if decided is not None:
                # Who is selected follows the pod's labels now; who it is to others follows its identity.
                self.policy.upsert_endpoint(str(endpoint_id), labels or decided.labels, ports_of(ports))
            if labels is not None:
                self.on_labels(endpoint_id, labels)
            self._local_networks(endpoint)
            self._pending.add(endpoint_id)
        self._flush_pending()

    def _flush_pending(self) -> None:
        pending, self._pending = self._pending, set()
        if pending:
            self._apply_policy()
        for endpoint_id in pending:
            self._endpoint_row(endpoint_id)

    def _local_networks(self, endpoint: LocalEndpoint) -> None:
        own = self.own_node()
        if own is not None:
            self._networks_of(("endpoint", endpoint.id), tuple(network.pod_routes(endpoint, own)))
        for key, mac in network.pod_neighbours(endpoint):
            self.rows.neighbours.put(key, mac)

    def _endpoint_row(self, endpoint_id: int) -> None:
        endpoint = self.tables.endpoints.get(endpoint_id)
        decided = self.tables.endpoint_identities.get(endpoint_id)
        if endpoint is None or decided is None:
            return
        policy = self.policy.endpoint(str(endpoint_id))
        # A pod whose labels aren't known may be one that policies select: only its node reaches it.
        closed = ENFORCE_BOTH if endpoint.pod and decided.number == Reserved.INIT else 0
        row = Endpoint(
            id=endpoint.id,
            identity=decided.number,
            policy_set=self.set_number(policy.set),
            flags=ENDPOINT_READY | policy.flags | closed,
            addr4=endpoint.addr4,
            addr6=endpoint.addr6,
            pod_mac=endpoint.pod_mac,
            host_mac=endpoint.host_mac,
        )
        self._known[endpoint_id] = endpoint
        self.rows.endpoints.put(endpoint.ifindex, row)
        for addr in endpoint.addrs:
            self.rows.local_addrs.put(addr, LocalAddr(endpoint.ifindex))
        self._hooks(endpoint.ifindex, "from_pod", "to_pod")

    def _forget(self, endpoint_id: int) -> None:
        self.policy.delete_endpoint(str(endpoint_id))
        self._identity_ports.put(("local", endpoint_id), 0, ())
        self._networks_of(("endpoint", endpoint_id), ())
        endpoint = self._known.pop(endpoint_id, None)
        if endpoint is None:
            return
        self.rows.endpoints.drop(endpoint.ifindex)
        for addr in endpoint.addrs:
            holder = self.rows.local_addrs.desired.get(addr)
            if holder is not None and holder.ifindex == endpoint.ifindex:
                self.rows.local_addrs.drop(addr)
        for key, _ in network.pod_neighbours(endpoint):
            self.rows.neighbours.drop(key)
        self._drop_hooks(endpoint.ifindex)

    # --- programs ----------------------------------------------------------------------------------------------------

    def _hooks(self, ifindex: int, ingress: str, egress: str) -> None:
        self.rows.device_links.put(DeviceHook(ifindex, "ingress"), ingress)
        self.rows.device_links.put(DeviceHook(ifindex, "egress"), egress)

    def _drop_hooks(self, ifindex: int) -> None:
        self.rows.device_links.drop(DeviceHook(ifindex, "ingress"))
        self.rows.device_links.drop(DeviceHook(ifindex, "egress"))

    def _device_hooks(self) -> None:
        if self.devices is None:
            return
        for ifindex in self.devices.uplinks:
            self._hooks(ifindex, "from_network", "to_network")
            if self.xdp != "disabled":
                self.rows.xdp_links.put(XdpHook(ifindex, self.xdp), XDP_PROGRAM)
        if self.devices.overlay:
            self._hooks(self.devices.overlay, "from_overlay", "to_overlay")
