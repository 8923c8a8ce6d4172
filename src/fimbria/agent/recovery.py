"""Endpoints that the journal has lost, found again.

A journal can be lost while the pods go on: its folder was emptied, a file can't be read, or a former version wrote what
this one doesn't understand. Then three others know a pod's attachment, and have to agree:

1. the interface, whose name is derived from the attachment and whose alias names the pod;
2. its row in the kernel: number, identity, addresses, MACs;
3. the pod's report (CiliumEndpoint), which names the attachment. Its name must lead to that of the interface.

What only some of them know isn't served: its rows go, the pod has no network, and the log and `fimbria status` say so.
"""

from __future__ import annotations

import asyncio
import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from fimbria.agent.datapath import map_target
from fimbria.agent.endpoints import host_ifname
from fimbria.agent.install import CONFIG
from fimbria.kernel import link, netns
from fimbria.kernel.netlink import NetlinkError, NetlinkSocket
from fimbria.model.address import pack, unpack
from fimbria.model.endpoint import EndpointIdentity, HostPort, LocalEndpoint
from fimbria.model.protocol import WITH_PORTS
from fimbria.model.rows import NO_ADDR, Endpoint
from fimbria.sources.k8s.errors import ApiError, NotFound
from fimbria.sources.k8s.resources import CILIUM_ENDPOINTS, PODS
from fimbria.sources.k8s.types.cilium import CiliumEndpoint
from fimbria.sources.k8s.types.core import Pod

if TYPE_CHECKING:
    from fimbria.agent.main import Agent

log = logging.getLogger(__name__)
AT_ONCE: Final = 8
TRIES: Final = 10
RETRY: Final = 1.0
_NAME: Final = re.compile(r"fim[0-9a-f]{11}")
_ALIAS: Final = re.compile(r"fimbria: ([a-z0-9-]+)/([a-z0-9.-]+)")


class Unknown(Exception):
    """Those who should know an endpoint don't agree; the text says in what."""


@dataclass(frozen=True, slots=True)
class Lost:
    """An interface of ours without an endpoint."""

    device: link.Device
    namespace: str
    pod: str
    row: Endpoint


async def recover(agent: Agent) -> int:
    """Find what the journal doesn't have, before rows that nobody wants are removed; returns how many were found."""
    rows: dict[int, Endpoint] = await asyncio.to_thread(
        map_target("endpoints", agent.datapath.maps["endpoints"], agent.layouts).read
    )
    # Connections name endpoints: a number that is in use must not be given to another.
    agent.skip_endpoint_ids(max((row.id for row in rows.values()), default=0))
    lost = find(link.dump(agent.netlink, kind="veth"), {e.ifindex for e in agent.tables.endpoints.values()}, rows)
    if not lost:
        return 0
    log.warning("the journal has lost %d endpoints; the cluster is asked about them", len(lost))
    places = await asyncio.to_thread(namespaces, Path(netns.RUN_DIR))
    limit = asyncio.Semaphore(AT_ONCE)

    async def one(found: Lost) -> bool:
        async with limit:
            return await _recover(agent, found, places)

    return sum(await asyncio.gather(*map(one, lost)))


def find(devices: list[link.Device], known: set[int], rows: dict[int, Endpoint]) -> list[Lost]:
    """The interfaces of pods that no endpoint has. One without a row was never finished, and has no traffic."""
    found = []
    for device in devices:
        alias = _ALIAS.fullmatch(device.alias)
        row = rows.get(device.index)
        if _NAME.fullmatch(device.name) and device.index not in known and alias and row is not None:
            found.append(Lost(device, alias[1], alias[2], row))
    return found


async def _recover(agent: Agent, lost: Lost, places: dict[bytes, str]) -> bool:
    assert agent.endpoints is not None
    try:
        report, pod = await _ask(agent, lost)
        endpoint, identity = agree(lost, report, pod, places.get(lost.row.pod_mac, ""))
    except (Unknown, ApiError) as error:
        log.error(
            "pod %s/%s has an interface of ours (%s), but it can't be served: %s; restart the pod",
            lost.namespace, lost.pod, lost.device.name, error,
        )  # fmt: skip
        return False
    return agent.endpoints.adopt(endpoint, identity)


async def _ask(agent: Agent, lost: Lost) -> tuple[CiliumEndpoint, Pod]:
    for attempt in range(TRIES):
        try:
            report = await agent.client.get(CILIUM_ENDPOINTS, lost.pod, lost.namespace)
            return report, await agent.client.get(PODS, lost.pod, lost.namespace)
        except NotFound:
            raise
        except ApiError:
            if attempt == TRIES - 1:
                raise
            await asyncio.sleep(RETRY)
    raise AssertionError


def agree(lost: Lost, report: CiliumEndpoint, pod: Pod, path: str) -> tuple[LocalEndpoint, EndpointIdentity]:
    """The endpoint that all describe. `path` is its network namespace's, empty if unknown. Raises Unknown."""
    row, status = lost.row, report.status
    container = status.external_identifiers.container_id
    ifname = status.external_identifiers.cni_attachment_id.rpartition(":")[2]
    if host_ifname(f"{container}/{ifname}") != lost.device.name:
        raise Unknown("its CiliumEndpoint names another attachment")
    pairs = status.networking.addressing or ()
    addrs = {ip for pair in pairs for ip in (pair.ipv4, pair.ipv6) if ip}
    if addrs != {unpack(a) for a in (row.addr4, row.addr6) if a != NO_ADDR}:
        raise Unknown("its CiliumEndpoint has other addresses")
    if status.identity.id != row.identity:
        raise Unknown(f"its CiliumEndpoint has identity {status.identity.id}, the kernel {row.identity}")
    labels = dict(text.partition("=")[::2] for text in status.identity.labels or ())
    endpoint = LocalEndpoint(
        id=row.id, container_id=container, ifname=ifname, network=str(CONFIG["name"]), netns=path,
        namespace=lost.namespace, pod=lost.pod, uid=_uid(pod), host_ifname=lost.device.name,
        ifindex=lost.device.index, pod_mac=row.pod_mac, host_mac=row.host_mac, addr4=row.addr4, addr6=row.addr6,
        host_ports=tuple(_host_ports(pod)),
    )  # fmt: skip
    return endpoint, EndpointIdentity(row.identity, labels)


def _uid(pod: Pod) -> str:
    return (pod.metadata.annotations or {}).get("kubernetes.io/config.mirror") or pod.metadata.uid


def _host_ports(pod: Pod) -> list[HostPort]:
    """What kubelet passed for the pod's containers. Raises Unknown: the API server takes any text as an address."""
    sidecars = [c for c in pod.spec.init_containers or () if c.restart_policy == "Always"]
    ports = [p for c in (*(pod.spec.containers or ()), *sidecars) for p in c.ports or () if p.host_port]
    try:
        return [
            HostPort(p.host_port, p.container_port, WITH_PORTS[p.protocol], pack(p.host_ip) if p.host_ip else b"")
            for p in ports
            if p.protocol in WITH_PORTS
        ]
    except ValueError as error:
        raise Unknown(f"a host port of its containers: {error}") from None


def namespaces(folder: Path) -> dict[bytes, str]:
    """The network namespaces in a folder, by the MACs of their interfaces."""
    found: dict[bytes, str] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        with suppress(OSError, NetlinkError), netns.opened(path) as fd, NetlinkSocket(fd) as sock:
            found |= {device.mac: str(path) for device in link.dump(sock, kind="veth")}
    return found
