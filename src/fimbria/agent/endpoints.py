"""CNI requests: pods join and leave the network here.

Rules
1. ADD answers only when every row it caused is in the kernel: the pod's policy is enforced before its first packet.
2. Each step of ADD can be the last one before a crash. What it leaves is found again by the journal, which is written
   before the interface is made, or by the interface's name, which is derived from the attachment; an ADD that fails
   takes back what it did.
3. DEL of something unknown succeeds; it removes what exists of the attachment, in whatever state.
4. An endpoint whose interface is gone (its network namespace was deleted without a DEL) is removed: it can't come back.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Final, TypeVar

from fimbria.agent.engine import Engine
from fimbria.agent.journal import Journal
from fimbria.agent.wiring import Wiring, WiringError
from fimbria.apply.attach import EGRESS, INGRESS, DeviceHook
from fimbria.apply.loop import ApplyLoop
from fimbria.decide.host_ports import HostPorts, HostPortTaken
from fimbria.decide.identity import IdentitiesExhausted
from fimbria.decide.ipam import AddressPool, AddressTaken, PoolExhausted
from fimbria.kernel import netns
from fimbria.model.address import Prefix, is_v4, unpack
from fimbria.model.endpoint import EndpointIdentity, LocalEndpoint, is_static
from fimbria.model.identity import Reserved
from fimbria.model.network import NeighbourKey
from fimbria.model.rows import NO_ADDR, PrefixKey
from fimbria.sources.cni.spec import (
    Address,
    CniError,
    Code,
    Interface,
    PrevResult,
    Request,
    Result,
    ResultRoute,
    encode_result,
)
from fimbria.sources.k8s.errors import ApiError
from fimbria.tables import Tables

log = logging.getLogger(__name__)
T = TypeVar("T")
ADD_TIMEOUT: Final = 60.0
POD_TIMEOUT: Final = 15.0
STATIC_TIMEOUT: Final = 3.0
INIT: Final = EndpointIdentity(Reserved.INIT, {"reserved:init": ""})
CHECK_PAUSE: Final = 0.3
HOST_PREFIX: Final = "fim"


def host_ifname(owner: str) -> str:
    """The host side's name of an attachment: the same for the same attachment, so leftovers are recognised."""
    return HOST_PREFIX + hashlib.sha256(owner.encode()).hexdigest()[:11]


def endpoint_mac(owner: str, side: str) -> bytes:
    """A locally administered MAC, the same for the same attachment."""
    digest = hashlib.sha256(f"{owner} {side}".encode()).digest()
    return bytes([digest[0] & 0xFC | 0x02]) + digest[1:6]


@dataclass(slots=True)
class EndpointManager:
    """Serves CNI requests. `identify(labels)` allocates an identity; `fetch_pod(namespace, name)` brings a pod and its
    namespace into the tables if the informer is late."""

    tables: Tables
    engine: Engine
    loop: ApplyLoop
    journal: Journal
    pool: AddressPool
    wiring: Wiring
    identify: Callable[[Mapping[str, str]], Awaitable[EndpointIdentity]]
    fetch_pod: Callable[[str, str], Awaitable[None]]
    next_id: Callable[[], int]
    reserved: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """Ports that no pod may have as hostPort, by protocol and number, and what they are for."""
    host_ports: HostPorts = field(default_factory=HostPorts)
    last_request: float = 0.0
    """When a pod last came or went (time.monotonic()): what can wait leaves the kernel's network lock to the next."""
    _locks: dict[str, asyncio.Lock] = field(default_factory=dict)
    _waiting: Counter[str] = field(default_factory=Counter)

    async def handle(self, request: Request) -> bytes:
        """One CNI request. Raises CniError."""
        if request.command == "STATUS":
            return self._status()
        if request.command == "GC":
            return await self._collect(request)
        self.last_request = time.monotonic()
        async with self._lock(request.owner):
            if request.command == "ADD":
                return await self._add_in_time(request)
            if request.command == "CHECK":
                return await self._check(request)
            await self._delete(request.owner)
            return b""

    def restore(self) -> int:
        """Take over the endpoints of the journal whose interfaces still exist; returns how many."""
        restored = 0
        for endpoint, identity in self.journal.endpoints():
            problem = self._gone(endpoint)
            if problem:
                log.warning("endpoint %s of %s is removed: %s", endpoint.id, endpoint.label, problem)
                self.wiring.remove(endpoint.host_ifname)
                self.journal.remove_endpoint(endpoint.id)
                continue
            restored += self._take_over(endpoint, identity)
        return restored

    def adopt(self, endpoint: LocalEndpoint, identity: EndpointIdentity) -> bool:
        """Serve an endpoint that the journal had lost, if it is still there."""
        if self._gone(endpoint) or not self._take_over(endpoint, identity):
            return False
        self.journal.save_endpoint(self.tables.endpoints[endpoint.id], identity)
        log.info("endpoint %s of %s was recovered", endpoint.id, endpoint.label)
        return True

    def _take_over(self, endpoint: LocalEndpoint, identity: EndpointIdentity | None) -> bool:
        try:
            for addr in endpoint.addrs:
                self.pool.claim(addr, endpoint.owner)
            self.host_ports.claim(endpoint.owner, endpoint.host_ports)
        except (AddressTaken, HostPortTaken) as error:
            log.error("endpoint %s of %s is not served: %s", endpoint.id, endpoint.label, error)
            return False
        if identity is not None:
            self.tables.endpoint_identities.upsert(endpoint.id, identity)
        self.tables.endpoints.upsert(endpoint.id, self._with_cookie(endpoint))
        return True

    @staticmethod
    def _with_cookie(endpoint: LocalEndpoint) -> LocalEndpoint:
        """A former version didn't save it."""
        if endpoint.netns_cookie:
            return endpoint
        with suppress(OSError), netns.opened(endpoint.netns) as fd:
            return replace(endpoint, netns_cookie=netns.cookie(fd))
        return endpoint

    def _gone(self, endpoint: LocalEndpoint) -> str:
        """Why a saved endpoint can't go on, empty if it can."""
        if not endpoint.ifindex:
            return "its ADD was never finished"
        exists = self.wiring.host_exists(endpoint.host_ifname, endpoint.ifindex)
        return "" if exists else f"interface {endpoint.host_ifname} is gone"

    async def vanished(self, ifindex: int) -> None:
        """The interface of an endpoint was deleted, most likely with its network namespace."""
        found = [e for e in self.tables.endpoints.values() if e.ifindex == ifindex]
        for endpoint in found:
            async with self._lock(endpoint.owner):
                if self.tables.endpoints.get(endpoint.id) == endpoint and not self.wiring.host_exists(
                    endpoint.host_ifname, ifindex
                ):
                    log.warning(
                        "interface %s of %s was deleted without a CNI DEL; its endpoint is removed",
                        endpoint.host_ifname, endpoint.label,
                    )  # fmt: skip
                    await self._delete(endpoint.owner)

    @asynccontextmanager
    async def _lock(self, owner: str) -> AsyncIterator[None]:
        """One request of an attachment at a time."""
        lock = self._locks.setdefault(owner, asyncio.Lock())
        self._waiting[owner] += 1
        try:
            async with lock:
                yield
        finally:
            self._waiting[owner] -= 1
            if not self._waiting[owner]:
                del self._waiting[owner], self._locks[owner]

    def set_identity(self, endpoint_id: int, identity: EndpointIdentity) -> None:
        """The labels of a running pod led to another identity."""
        endpoint = self.tables.endpoints.get(endpoint_id)
        if endpoint is not None:
            self.journal.save_endpoint(endpoint, identity)
            self.tables.endpoint_identities.upsert(endpoint_id, identity)

    # --- ADD ---------------------------------------------------------------------------------------------------------

    async def _add_in_time(self, request: Request) -> bytes:
        try:
            return await asyncio.wait_for(self._add(request), ADD_TIMEOUT)
        except TimeoutError:
            raise CniError(
                Code.TRY_AGAIN_LATER,
                f"the interface of {_who(request)} was not ready within {ADD_TIMEOUT:.0f} s",
                "the agent is waiting for the API server; see fimbria status",
            ) from None

    async def _add(self, request: Request) -> bytes:
        if not self.loop.opened:
            raise CniError(Code.TRY_AGAIN_LATER, "the Fimbria agent is still starting", "see fimbria status")
        known = self._find(request.owner)
        if known is not None:
            await self._readd(request, known)
        identity = await self._identity(request)
        try:
            endpoint = self._decide(request)
            return await self._connect(request, endpoint, identity)
        except BaseException:
            await asyncio.shield(self._delete(request.owner))
            raise

    async def _readd(self, request: Request, known: LocalEndpoint) -> None:
        """ADD of an attachment that exists: an error by the specification, unless it is the rest of a broken one."""
        if await asyncio.to_thread(self.wiring.pod_has, request.netns_fd, request.ifname):
            raise CniError(
                Code.INTERFACE_EXISTS, f"{request.ifname} of {_who(request)} exists already", f"endpoint {known.id}"
            )
        await self._delete(request.owner)

    def _decide(self, request: Request) -> LocalEndpoint:
        families = [v4 for v4 in (True, False) if self.pool.blocks(v4=v4)]
        if not families:
            raise CniError(
                Code.TRY_AGAIN_LATER,
                "this node has no pod addresses yet",
                "its CiliumNode has no podCIDRs; see the operator",
            )
        try:
            addrs = {v4: self.pool.allocate(request.owner, v4=v4) for v4 in families}
        except PoolExhausted as error:
            self.pool.release(request.owner)
            raise CniError(Code.NO_ADDRESS, f"no address for {_who(request)}", str(error)) from None
        self._claim_host_ports(request)
        namespace, pod = request.pod or ("", "")
        return LocalEndpoint(
            id=self.next_id(),
            container_id=request.container_id,
            ifname=request.ifname,
            network=request.network,
            netns=request.netns,
            namespace=namespace,
            pod=pod,
            uid=request.args.get("K8S_POD_UID", ""),
            host_ifname=host_ifname(request.owner),
            ifindex=0,
            pod_mac=endpoint_mac(request.owner, "pod"),
            host_mac=endpoint_mac(request.owner, "host"),
            addr4=addrs.get(True, NO_ADDR),
            addr6=addrs.get(False, NO_ADDR),
            host_ports=request.host_ports,
            netns_cookie=_cookie(request),
        )

    def _claim_host_ports(self, request: Request) -> None:
        """Raises CniError for a port that is another pod's or a Service's, or an address that isn't the node's."""
        for port in request.host_ports:
            if port.host_ip and not port.is_any(port.host_ip) and not self.wiring.host_has(port.host_ip):
                raise CniError(
                    Code.NO_HOST_PORT, f"{port} of {_who(request)}: this node has no address {unpack(port.host_ip)}"
                )
            purpose = self.reserved.get((port.proto, port.port))
            if purpose is not None:
                raise CniError(Code.NO_HOST_PORT, f"{port} of {_who(request)} is the node's own: {purpose}")
            holder = self.engine.local.node_port_service(port)
            if holder is not None:
                raise CniError(Code.NO_HOST_PORT, f"{port} of {_who(request)} is the node port of {holder}")
        try:
            self.host_ports.claim(request.owner, request.host_ports)
        except HostPortTaken as error:
            other = self._find(error.owner) if error.owner else None
            raise CniError(
                Code.NO_HOST_PORT,
                f"{_who(request)} can't have its host port",
                f"{error.text} {other.label}" if other is not None else str(error),
            ) from None

    async def _identity(self, request: Request) -> EndpointIdentity:
        if request.pod is None:
            return INIT
        try:
            return await self.identify(await self._labels(request))
        except (ApiError, IdentitiesExhausted) as error:
            refused = CniError(Code.TRY_AGAIN_LATER, f"pod {_who(request)} gets no security identity", str(error))
        except CniError as error:
            refused = error
        if not is_static(request.args.get("K8S_POD_UID", "")):
            raise refused from None
        # Kubelet runs it whether there is an API server or not, which may be what it is needed for.
        text = "static pod %s starts closed to all but its node, until its labels are known: %s"
        log.warning(text, _who(request), refused)
        return INIT

    async def _labels(self, request: Request) -> Mapping[str, str]:
        """All labels of a pod. Raises CniError if the API server doesn't tell in time."""
        namespace, name = request.pod or ("", "")
        uid = request.args.get("K8S_POD_UID", "")
        probe = LocalEndpoint(0, request.container_id, request.ifname, "", "", namespace, name, uid, "", 0, b"", b"")
        patience = STATIC_TIMEOUT if is_static(uid) else POD_TIMEOUT
        refused, pause = "it may just be deleted", 0.02
        try:
            async with asyncio.timeout(patience):
                while (labels := self.engine.labels(probe)) is None:
                    try:
                        await self.fetch_pod(namespace, name)
                    except ApiError as error:
                        refused = str(error)
                    if self.engine.labels(probe) is None:
                        await asyncio.sleep(pause)
                        pause = min(pause * 2, 1.0)
                return labels
        except TimeoutError:
            raise CniError(
                Code.TRY_AGAIN_LATER, f"pod {namespace}/{name} is not known to the API server", refused
            ) from None

    async def _connect(self, request: Request, planned: LocalEndpoint, identity: EndpointIdentity) -> bytes:
        self.journal.save_endpoint(planned, identity)
        ifindex = await self._wire(request, self.wiring.create, planned)
        endpoint = replace(planned, ifindex=ifindex)
        self.journal.save_endpoint(endpoint, identity)
        # No await from here to the flush: the engine sees endpoint and identity together.
        self.tables.endpoint_identities.upsert(endpoint.id, identity)
        self.tables.endpoints.upsert(endpoint.id, endpoint)
        self.engine.step()
        await self.loop.flush()
        failure = self._failure(endpoint)
        if failure is not None:
            raise CniError(Code.TRY_AGAIN_LATER, f"the datapath of {_who(request)} could not be set up", failure)
        # Only now may the pod's side send: its programs and its policy are there.
        await self._wire(request, self.wiring.configure, endpoint)
        return encode_result(self._result(request, endpoint), request.version)

    async def _wire(self, request: Request, step: Callable[[LocalEndpoint, int], T], endpoint: LocalEndpoint) -> T:
        work = asyncio.create_task(asyncio.to_thread(step, endpoint, request.netns_fd))
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            # The thread goes on all the same: what it makes must be there before it is taken back.
            await asyncio.wait([work])
            raise
        except WiringError as error:
            code = Code.INTERFACE_EXISTS if error.errno == errno.EEXIST else Code.IO_FAILURE
            raise CniError(code, f"cannot make the interface of {_who(request)}", str(error)) from None

    def _failure(self, endpoint: LocalEndpoint) -> str | None:
        """Why something of the endpoint is not in the kernel."""
        ifindex, failure = endpoint.ifindex, self.loop.failure
        reasons = [failure("device_links", DeviceHook(ifindex, side)) for side in (INGRESS, EGRESS)]
        reasons.append(failure("endpoints", ifindex))
        for addr in endpoint.addrs:
            reasons.append(failure("ipcache", PrefixKey(128, addr)))
            reasons.append(failure("local_addrs", addr))
            reasons.append(failure("neighbours", NeighbourKey(ifindex, addr)))
            reasons.append(failure("routes", Prefix.host(addr)))
        reasons += [failure("frontends", key) for key in self.engine.local.host_port_frontends(endpoint)]
        return next((r for r in reasons if r is not None), None)

    def _result(self, request: Request, endpoint: LocalEndpoint) -> Result:
        interfaces = (
            Interface(endpoint.host_ifname, endpoint.host_mac.hex(":"), mtu=self.wiring.pod_mtu),
            Interface(endpoint.ifname, endpoint.pod_mac.hex(":"), request.netns, self.wiring.pod_mtu),
        )
        ips, routes = [], []
        for addr in endpoint.addrs:
            v4 = is_v4(addr)
            gateway = self.wiring.gateway(v4=v4)
            ips.append(Address(addr, 32 if v4 else 128, gateway, 1))
            routes.append(ResultRoute(_default(v4), gateway, self.wiring.pod_mtu))
        return Result(interfaces, tuple(ips), tuple(routes), request.config.get("dns") or {})

    # --- DEL, CHECK, STATUS, GC --------------------------------------------------------------------------------------

    async def _delete(self, owner: str) -> None:
        endpoint = self._find(owner)
        if endpoint is not None:
            self.tables.endpoints.delete(endpoint.id)
            self.tables.endpoint_identities.delete(endpoint.id)
            self.engine.step()
            if self.loop.opened:
                await self.loop.flush()
        for saved, _ in self.journal.endpoints() if endpoint is None else ():
            if saved.owner == owner:
                self.journal.remove_endpoint(saved.id)
        self.wiring.remove_later(host_ifname(owner))
        # Last: an address must not be given away before nothing leads to its former owner.
        self.pool.release(owner)
        self.host_ports.release(owner)
        if endpoint is not None:
            self.journal.remove_endpoint(endpoint.id)

    async def _check(self, request: Request) -> bytes:
        endpoint = self._find(request.owner)
        if endpoint is None:
            raise CniError(Code.UNKNOWN_CONTAINER, f"{_who(request)} has no interface {request.ifname} of ours")
        expected = request.prev_result
        if expected is None:
            raise CniError(Code.INVALID_CONFIG, "CHECK without a prevResult", "it is the result of ADD")
        # A runtime may take a failed CHECK for final: what the agent repairs by itself must not cost the pod.
        self.loop.audit_soon(quick=True)
        await self.loop.flush()
        problems = await self._problems(endpoint, request, expected)
        if problems:
            await asyncio.sleep(CHECK_PAUSE)
            problems = await self._problems(endpoint, request, expected)
        if problems:
            raise CniError(
                Code.CHECK_FAILED, f"{request.ifname} of {_who(request)} is not as ADD left it", "; ".join(problems)
            )
        return b""

    async def _problems(self, endpoint: LocalEndpoint, request: Request, expected: PrevResult) -> list[str]:
        """What is missing or wrong of what ADD made, as far as `expected` has it: later plugins may have changed it."""
        addrs = tuple(a for a in endpoint.addrs if unpack(a) in expected.addresses)
        routes = tuple(v4 for v4 in (True, False) if _default(v4) in expected.routes)
        problems = await asyncio.to_thread(self.wiring.problems, endpoint, request.netns_fd, addrs, routes)
        if request.ifname not in expected.macs:
            problems.append(f"prevResult has no interface {request.ifname}")
        if request.host_ports and set(request.host_ports) != set(endpoint.host_ports):
            problems.append("runtimeConfig.portMappings are not those of ADD")
        if not addrs:
            problems.append(f"prevResult has none of {', '.join(map(unpack, endpoint.addrs))}")
        failure = self._failure(endpoint)
        return [*problems, failure] if failure else problems

    def _status(self) -> bytes:
        if not self.loop.opened:
            raise CniError(Code.NOT_AVAILABLE, "the Fimbria agent is still starting", "see fimbria status")
        if not self.pool.blocks(v4=True) and not self.pool.blocks(v4=False):
            raise CniError(Code.NOT_AVAILABLE, "this node has no pod addresses yet", "its CiliumNode has no podCIDRs")
        for v4 in (True, False):
            blocks = self.pool.blocks(v4=v4)
            used = sum(any(Prefix.host(a) in b for b in blocks) for a in self.pool.owners if is_v4(a) == v4)
            if blocks and used >= self.pool.capacity(v4=v4):
                raise CniError(
                    Code.NOT_AVAILABLE,
                    f"no {'IPv4' if v4 else 'IPv6'} address is left on this node",
                    f"all {used} of {', '.join(map(str, blocks))} are in use",
                )
        return b""

    async def _collect(self, request: Request) -> bytes:
        valid = request.valid_attachments
        stale = [
            e.owner for e in self.tables.endpoints.values() if e.network == request.network and e.owner not in valid
        ]
        failed = []
        for owner in stale:
            log.info("CNI GC: %s is not valid any more", owner)
            try:
                async with self._lock(owner):
                    await self._delete(owner)
            except OSError as error:
                failed.append(f"{owner}: {error}")
        if failed:
            raise CniError(Code.IO_FAILURE, f"{len(failed)} of {len(stale)} could not be removed", "; ".join(failed))
        return b""

    def _find(self, owner: str) -> LocalEndpoint | None:
        ids = self.tables.endpoints.by("owner", owner)
        return self.tables.endpoints.get(next(iter(ids))) if ids else None


def _cookie(request: Request) -> int:
    try:
        return netns.cookie(request.netns_fd)
    except OSError as error:
        raise CniError(Code.IO_FAILURE, f"the namespace of {_who(request)} can't be entered", str(error)) from None


def _default(v4: bool) -> str:
    return "0.0.0.0/0" if v4 else "::/0"


def _who(request: Request) -> str:
    return "/".join(request.pod) if request.pod else f"container {request.container_id[:12]}"
