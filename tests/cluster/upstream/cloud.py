"""What a cloud does for Services of type LoadBalancer: `python -m tests.cluster.upstream.cloud PKI`, in the network of
the bed's control plane, where upstream's specs are the clients.

Each Service gets an address per family. It leads to all nodes; with externalTrafficPolicy Local to those whose
health-check node port says 200. Packets arrive unchanged (ipMode VIP). A finalizer keeps a Service until its address is
taken back (KEP-980). Decisions are those of the lab's load balancers.
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
from tests.cluster.bed.layout import API_ADDRESS, API_PORT

from fimbria.lab.balancers import CHECK_EVERY, CHECK_PATIENCE, POOLS, Balancer, Health, ServiceObject, assign, balancer

FINALIZER = "service.kubernetes.io/load-balancer-cleanup"
# Where clients of load balancers call from: outside of the nodes' network, as upstream's specs expect (RFC 5737).
CLIENT = "198.51.100.1"
PROTO = "173"  # marks our routes
Json = dict[str, Any]
Routes = dict[str, tuple[str, ...]]


def released(service: Json) -> bool:
    """Whether a Service that has our finalizer or an address has no use for it any more."""
    meta, ingress = service["metadata"], service.get("status", {}).get("loadBalancer", {}).get("ingress")
    wants = service["spec"].get("type") == "LoadBalancer" and not meta.get("deletionTimestamp")
    return not wants and bool(ingress or FINALIZER in meta.get("finalizers", ()))


def finalizers(service: Json, ours: bool) -> list[str]:
    """The list with or without our entry."""
    others = [one for one in service["metadata"].get("finalizers", ()) if one != FINALIZER]
    return [*others, FINALIZER] if ours else others


def routes_of(addresses: Mapping[str, Sequence[str]], nodes: Mapping[str, Sequence[Json]]) -> Routes:
    """Address -> the nodes' addresses of its family. `nodes` has for each Service the nodes that it leads to."""
    found: Routes = {}
    for key, given in addresses.items():
        for address in given:
            via = [_internal(node, ":" in address) for node in nodes[key]]
            found[address] = tuple(sorted(one for one in via if one))
    return found


def _internal(node: Json, v6: bool) -> str:
    listed = (one["address"] for one in node["status"]["addresses"] if one["type"] == "InternalIP")
    return next((one for one in listed if (":" in one) == v6), "")


class Api:
    """The few requests, as the administrator. Raises OSError with the server's words."""

    def __init__(self, pki: Path) -> None:
        self._context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        self._context.load_cert_chain(pki / "admin.crt", pki / "admin.key")

    def list(self, resource: str) -> list[Json]:
        return list(self._ask("GET", f"/api/v1/{resource}")["items"])

    def patch(self, service: Json, change: Json, part: str = "") -> None:
        meta = service["metadata"]
        self._ask("PATCH", f"/api/v1/namespaces/{meta['namespace']}/services/{meta['name']}{part}", change)

    def _ask(self, method: str, path: str, body: Json | None = None) -> Json:
        connection = http.client.HTTPSConnection(API_ADDRESS, API_PORT, context=self._context, timeout=10)
        try:
            headers = {"Content-Type": "application/merge-patch+json"} if body else {}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status not in (200, 404):  # gone meanwhile is as good
            raise OSError(f"{method} {path}: {answer.status} {text[:300]!r}")
        return dict(json.loads(text))


class Cloud:
    """The loop."""

    def __init__(self, api: Api) -> None:
        self._api, self._health, self._routed = api, Health(), Routes()

    def once(self) -> None:
        """One look at the cluster, and what follows from it. Raises OSError."""
        services = {f"{s['metadata']['namespace']}/{s['metadata']['name']}": s for s in self._api.list("services")}
        nodes = self._api.list("nodes")
        found = {key: balancer(msgspec.convert(service, ServiceObject)) for key, service in services.items()}
        wanted = {key: one for key, one in found.items() if one}
        addresses = assign(wanted)
        self._check(nodes, sorted({one.health_port for one in wanted.values()} - {0}))
        after = {key: [n for n in nodes if self._serves(n, one)] for key, one in wanted.items()}
        # Nodes don't share whom they sent a client to: that it meets the same node is the balancer's part.
        after |= {key: after[key][:1] for key in after if services[key]["spec"].get("sessionAffinity") == "ClientIP"}
        self._route(routes_of(addresses, after))
        for key, one in wanted.items():
            self._tell(services[key], one, addresses[key])
        for service in services.values():
            if released(service):
                self._api.patch(service, {"status": {"loadBalancer": None}}, "/status")
                self._api.patch(service, {"metadata": {"finalizers": finalizers(service, ours=False) or None}})

    def _serves(self, node: Json, one: Balancer) -> bool:
        return not one.health_port or self._health.good(node["metadata"]["name"], one.health_port)

    def _tell(self, service: Json, one: Balancer, addresses: Sequence[str]) -> None:
        if FINALIZER not in service["metadata"].get("finalizers", ()):
            self._api.patch(service, {"metadata": {"finalizers": finalizers(service, ours=True)}})
        if tuple(addresses) != one.addresses:
            ingress = [{"ip": address, "ipMode": "VIP"} for address in addresses]
            self._api.patch(service, {"status": {"loadBalancer": {"ingress": ingress}}}, "/status")

    def _check(self, nodes: Sequence[Json], ports: Sequence[int]) -> None:
        self._health.keep(ports)
        asked = [(node, port) for node in nodes for port in ports]
        with ThreadPoolExecutor(max(1, len(asked))) as pool:
            answers = list(pool.map(lambda one: healthy(_internal(one[0], v6=False), one[1]), asked))
        for (node, port), good in zip(asked, answers, strict=True):
            self._health.heard(node["metadata"]["name"], port, good)

    def _route(self, wanted: Routes) -> None:
        for address, via in wanted.items():
            if via and self._routed.get(address) != via:
                source = () if ":" in address else ("src", CLIENT)
                _ip("replace", address, *source, *(word for one in via for word in ("nexthop", "via", one)))
        for address in self._routed:
            if not wanted.get(address):
                _ip("delete", address)
        self._routed = {address: via for address, via in wanted.items() if via}


def healthy(node: str, port: int) -> bool | None:
    """Whether the node's health-check port says 200; None if nobody answers."""
    try:
        with urllib.request.urlopen(f"http://{node}:{port}/healthz", timeout=CHECK_PATIENCE) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError:
        return False
    except OSError:
        return None


def _ip(verb: str, address: str, *words: str) -> None:
    command = ["ip", f"-{ip_address(address).version}", "route", verb, address, "proto", PROTO, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(" ".join(command[2:]), done.stderr.strip(), flush=True)


def main(pki: Path) -> None:
    subprocess.run(["ip", "address", "replace", f"{CLIENT}/32", "dev", "lo"], check=True)
    # An address without a Service swallows packets, as a cloud's does: martians on lo are dropped without a word.
    subprocess.run(["ip", "route", "replace", str(POOLS["IPv4"]), "dev", "lo", "proto", PROTO], check=True)
    # connections are spread, not addresses alone: one client is all there is
    for family in ("ipv4", "ipv6"):
        Path(f"/proc/sys/net/{family}/fib_multipath_hash_policy").write_text("1")
    cloud = Cloud(Api(pki))
    while True:
        try:
            cloud.once()
        except OSError as error:
            print(error, flush=True)
        time.sleep(CHECK_EVERY)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
