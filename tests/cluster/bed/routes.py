"""Tells the control plane's network where pods are, as a cloud's route controller does; a daemon of its own.

The API server reaches pods itself (proxies of pods and Services, webhooks, aggregated servers) and isn't on a node
here. The pod ranges of each CiliumNode become routes over that node's address in the namespace this runs in.
"""

from __future__ import annotations

import http.client
import json
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

from tests.cluster.bed.layout import API_ADDRESS, API_PORT

PATH = "/apis/cilium.io/v2/ciliumnodes"
WATCH_SECONDS, RETRY_SECONDS = 240, 1.0
PROTO = "172"  # marks our routes
Routes = dict[str, str]


def routes_of(node: dict[str, Any]) -> Routes:
    """Pod range -> the node's address of the same family. What can't be read is left out."""
    spec = node.get("spec") or {}
    found: Routes = {}
    hosts = [a.get("ip", "") for a in spec.get("addresses") or [] if a.get("type") == "InternalIP"]
    for text in (spec.get("ipam") or {}).get("podCIDRs") or []:
        try:
            network = ip_network(text)
            via = next(h for h in hosts if ip_address(h).version == network.version)
        except (ValueError, StopIteration):
            continue
        found[str(network)] = via
    return found


class Connection:
    """To the API server, as the administrator."""

    def __init__(self, pki: Path):
        context = ssl.create_default_context(cafile=str(pki / "ca.crt"))
        context.load_cert_chain(pki / "admin.crt", pki / "admin.key")
        self._http = http.client.HTTPSConnection(API_ADDRESS, API_PORT, context=context, timeout=WATCH_SECONDS + 30)

    def get(self, query: str) -> http.client.HTTPResponse:
        self._http.request("GET", f"{PATH}?{query}")
        answer = self._http.getresponse()
        if answer.status != http.client.OK:
            raise OSError(f"{PATH}: {answer.status} {answer.read(300)!r}")
        return answer

    def close(self) -> None:
        self._http.close()


def follow(pki: Path) -> Iterator[dict[str, Routes]]:
    """Routes by node's name after each change; ends when the watch does."""
    connection = Connection(pki)
    try:
        listed = json.loads(connection.get("").read())
        nodes = {item["metadata"]["name"]: routes_of(item) for item in listed["items"]}
        yield nodes
        version = listed["metadata"]["resourceVersion"]
        watch = connection.get(f"watch=1&resourceVersion={version}&timeoutSeconds={WATCH_SECONDS}")
        for line in watch:
            event = json.loads(line)
            if event["type"] == "ERROR":
                return
            name = event["object"]["metadata"]["name"]
            nodes = {k: v for k, v in nodes.items() if k != name}
            if event["type"] != "DELETED":
                nodes[name] = routes_of(event["object"])
            yield nodes
    finally:
        connection.close()


def put(wanted: Routes, present: Routes) -> None:
    for network, via in wanted.items():
        if present.get(network) != via:
            _ip("replace", network, via)
    for network, via in present.items():
        if network not in wanted:
            _ip("delete", network, via)


def _ip(verb: str, network: str, via: str) -> None:
    family = f"-{ip_network(network).version}"
    done = subprocess.run(
        ["ip", family, "route", verb, network, "via", via, "proto", PROTO], capture_output=True, text=True, check=False
    )
    print(f"{verb} {network} via {via} {done.stderr.strip()}", flush=True)


def main(pki: Path) -> None:
    present: Routes = {}
    while True:
        try:
            for nodes in follow(pki):
                wanted = {network: via for routes in nodes.values() for network, via in routes.items()}
                put(wanted, present)
                present = wanted
        except (OSError, http.client.HTTPException, ValueError):
            time.sleep(RETRY_SECONDS)  # no API server, or no definition of CiliumNode yet


if __name__ == "__main__":
    main(Path(sys.argv[1]))
