"""What a local redirect asks of the node's frontends. Pure.

Rules
1. The frontend leads to the ready pods of this node that the policy selects. In a family without any nothing is asked
   for, so the Service's own endpoints serve; an address that is no Service's is left alone.
2. One port in front and one behind belong together, whatever they are called, if they have the same protocol. Of
   several those with the same name and protocol do.
3. Only cluster IPs are redirected: node ports and load balancers are for clients that are elsewhere.
4. A Service's address isn't taken over by naming the address, nor is one that a node or a pod has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fimbria.compute.service import HOST_PORT, REDIRECT, Extra, Owner
from fimbria.compute.service_claims import LOCAL_REDIRECT
from fimbria.compute.service_frontends import CLUSTER_IP, EXEMPT
from fimbria.model.address import is_v4, unpack
from fimbria.model.redirect import LocalPod, Redirect, RedirectPort
from fimbria.model.rows import ExemptKey, FrontendKey
from fimbria.model.service import Service


def owner(redirect: Redirect) -> Owner:
    """A redirect of a Service goes before the Service; one of an address after whoever has that address."""
    rank = REDIRECT if redirect.service is not None else HOST_PORT
    return Owner(rank, LOCAL_REDIRECT, redirect.id.namespace, redirect.id.name)


def extras(redirect: Redirect, service: Service | None, pods: Iterable[LocalPod]) -> tuple[Extra, ...]:
    """The frontends that lead to local pods now. `service` is the one that the redirect names, if it is there."""
    addrs = _addresses(redirect, service)
    flags = CLUSTER_IP | (EXEMPT if redirect.skip else 0)
    ready = [addr for pod in pods if pod.ready for addr in pod.addrs]
    found = []
    for front, behind in pairs(redirect, service):
        for v4 in (True, False):
            keys = tuple(FrontendKey(a, front.port, front.proto) for a in addrs if is_v4(a) == v4)
            backends = tuple(sorted((a, behind.port, behind.proto) for a in ready if is_v4(a) == v4))
            if keys and backends:
                found.append(Extra(keys, backends, flags, front.name))
    return tuple(found)


def pairs(redirect: Redirect, service: Service | None) -> Iterator[tuple[RedirectPort, RedirectPort]]:
    """Which port in front leads to which behind."""
    fronts = _fronts(redirect, service)
    if len(fronts) == len(redirect.targets) == 1:
        if fronts[0].proto == redirect.targets[0].proto:
            yield fronts[0], redirect.targets[0]
        return
    behind = {(t.name, t.proto): t for t in redirect.targets if t.name}
    for front in fronts:
        target = behind.get((front.name, front.proto))
        if target is not None:
            yield front, target


def exempt(redirect: Redirect, numbers: Iterable[int], pods: Iterable[LocalPod]) -> Iterator[ExemptKey]:
    """The clients that see the frontends of these service ids as they are: the selected pods, ready or not."""
    for pod in pods if redirect.skip else ():
        for number in numbers:
            yield ExemptKey(pod.endpoint, number, 1)
            if pod.netns_cookie:
                yield ExemptKey(pod.netns_cookie, number, 0)


def problems(redirect: Redirect, service: Service | None, pods: Iterable[LocalPod], *, foreign: bool) -> Iterator[str]:
    """Why a redirect that is right in itself does nothing on this node, a sentence each. `foreign`: its address is a
    Service's, a node's or a pod's."""
    if foreign:
        yield f"{unpack(redirect.addr or b'')} is the address of a Service, a node or a pod, which can't be redirected"
    elif redirect.service is not None and service is None:
        yield f"there is no Service {redirect.service}"
    elif redirect.service is not None and not _addresses(redirect, service):
        yield f"Service {redirect.service} has no cluster IP"
    elif not list(pairs(redirect, service)):
        yield "no port of the frontend has its counterpart (same protocol and name) in redirectBackend.toPorts"
    elif not any(pod.ready for pod in pods):
        yield "this node has no ready pod that it selects: nothing is redirected here"


def _addresses(redirect: Redirect, service: Service | None) -> tuple[bytes, ...]:
    if redirect.addr is not None:
        return (redirect.addr,)
    return service.cluster_ips if service is not None else ()


def _fronts(redirect: Redirect, service: Service | None) -> tuple[RedirectPort, ...]:
    if redirect.addr is not None:
        return redirect.ports
    there = tuple(RedirectPort(p.name, p.port, p.proto) for p in service.ports) if service is not None else ()
    if not redirect.ports:
        return there
    wanted = {(p.port, p.proto): p for p in redirect.ports}
    return tuple(wanted[p.port, p.proto] for p in there if (p.port, p.proto) in wanted)
