"""Policies that change under traffic, that can't be used, and that are there before the pod: denied, never allowed."""

import contextlib
import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from traffic import TCP, Traffic, agent, cluster_ips, pod, start_pods, wait_settled

from fimbria.lab import kernel
from fimbria.lab.errors import LabError
from fimbria.lab.handle import Lab
from fimbria.sources.k8s.errors import ApiError

POLICIES = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"
CILIUM = "/apis/cilium.io/v2/namespaces/default/ciliumnetworkpolicies"
ONLY_CLIENT = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-client}
spec:
  podSelector: {matchLabels: {app: server}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}]}]
"""
DENY_STRANGERS = """
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: no-strangers}
spec:
  podSelector: {matchLabels: {app: client}}
  policyTypes: [Ingress]
"""


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2)
    start_pods(lab)
    lab.apply(pod("stranger", "node1", sleeps=True) + pod("far-stranger", "node2", sleeps=True))
    lab.wait_ready(["stranger", "far-stranger"])
    return lab


@pytest.fixture(autouse=True)
def _settled(lab: Lab) -> Iterator[None]:
    yield
    for path in (POLICIES, CILIUM):
        for item in lab.request("GET", path)["items"]:
            lab.request("DELETE", f"{path}/{item['metadata']['name']}")
    wait_settled(lab)
    lab.wait("no policy is left", lambda: all(agent(lab, n, "status")["policies"] == 0 for n in lab.spec.node_names))


def result(lab: Lab, source: str, address: str) -> str:
    """Soon, for what is expected to fail."""
    return str(lab.probe(source, "tcp", address, TCP, "--timeout", "300")["result"])


def connects(lab: Lab, source: str, address: str) -> bool:
    """With the patience of a client on a busy machine."""
    return bool(lab.probe(source, "tcp", address, TCP, "--timeout", "3500")["result"] == "ok")


def test_established_connections_follow_the_policy(lab: Lab) -> None:
    """What is allowed loses nothing, what is denied stops, when policies come and go a few times."""
    tool = kernel.binary("labtool")
    targets = [(s, n) for s in ("stranger", "far-stranger") for n in ("near", "far")]
    options = ("--interval", "20000", "--timeout", "1000")
    with Traffic(lab):
        denied = [lab.start(s, tool, "stream", "tcp", lab.addresses(n)[0], str(TCP), *options) for s, n in targets]
        for stream in denied:
            assert stream.stdout is not None
            assert "connected" in stream.stdout.readline()
        for _ in range(2):
            lab.apply(DENY_STRANGERS)
            lab.delete(DENY_STRANGERS)
        lab.apply(ONLY_CLIENT)
        lab.apply(DENY_STRANGERS)
        lab.wait("strangers are denied", lambda: all(result(lab, s, lab.addresses(n)[0]) != "ok" for s, n in targets))
        time.sleep(0.5)
        for stream in denied:
            stream.send_signal(signal.SIGTERM)
        outcomes = [json.loads(s.communicate(timeout=10)[0].splitlines()[-1]) for s in denied]
    assert not any(o["ok"] for o in outcomes), ("an established connection that is denied now stops", outcomes)
    assert all(connects(lab, "client", a) for a in cluster_ips(lab))
    # And under policies the agents may die as well: replies are recognised by what the kernel remembers.
    with Traffic(lab):
        for node in lab.spec.node_names:
            lab.kill(f"{node}/agent")
            lab.restart(f"{node}/agent")
        wait_settled(lab)
    assert all(result(lab, s, lab.addresses(n)[0]) != "ok" for s, n in targets)


def test_a_pod_is_never_reachable_before_its_policy(lab: Lab) -> None:
    lab.apply(ONLY_CLIENT)
    lab.wait("both agents know it", lambda: all(agent(lab, n, "status")["policies"] == 1 for n in lab.spec.node_names))
    names = [f"racer{i}" for i in range(10)]
    tool = kernel.binary("labtool")
    # The addresses that the next pods of each node will get, tried all the time from everywhere.
    blocks = [b for n in lab.spec.node_names for b in agent(lab, n, "status")["pod_cidrs"] if "." in b]
    hosts = " ".join(b.replace(".0/24", f".{h}") for b in blocks for h in range(2, 30))
    script = f"while :; do for a in {hosts}; do {tool} probe tcp $a {TCP} --timeout 5; done; done"
    busy = {a for n in ("near", "far", "client", "stranger", "far-stranger") for a in lab.addresses(n)}
    attackers = {s: lab.start(s, "sh", "-c", script) for s in ("stranger", "far-stranger")}
    heard: dict[str, list[str]] = {s: [] for s in attackers}

    def listen(source: str, process: "subprocess.Popen[str]") -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):
            heard[source].extend(process.stdout)

    threads = [threading.Thread(target=listen, args=(s, p)) for s, p in attackers.items()]
    for thread in threads:
        thread.start()
    try:
        lab.apply("".join(pod(n, f"node{i % 2 + 1}", "server") for i, n in enumerate(names)))
        lab.wait_ready(names, 60)
        addresses = {a for n in names for a in lab.addresses(n)}
        time.sleep(1)
    finally:
        for process in attackers.values():
            process.kill()
        for thread in threads:
            thread.join()
    for source, lines in heard.items():
        found = [json.loads(line) for line in lines if line.startswith("{") and line.rstrip().endswith("}")]
        tried = {f["host"] for f in found} & addresses
        assert len(tried) >= len(names) // 2, f"{source} tried too few of them: {tried}"
        assert [f for f in found if f["result"] == "ok" and f["host"] not in busy] == [], source
    lab.delete("".join(pod(n, "node1") for n in names))
    lab.wait("they are gone", lambda: sum(len(agent(lab, n, "endpoints")) for n in lab.spec.node_names) == 5, 30)


BAD = {
    "an invalid CIDR": (POLICIES, {"podSelector": {}, "ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}]}),
    "an invalid CIDR of Cilium's": (CILIUM, {"endpointSelector": {}, "ingress": [{"fromCIDR": ["300.1.1.1/8"]}]}),
    "an unknown field": (CILIUM, {"endpointSelector": {}, "ingress": [{"fromMoon": [{}]}]}),
    "what isn't supported yet": (CILIUM, {"endpointSelector": {}, "ingress": [{"fromGroups": [{"aws": {}}]}]}),
    "a port out of range": (CILIUM, {"endpointSelector": {}, "ingress": [
        {"toPorts": [{"ports": [{"port": "70000", "protocol": "TCP"}]}]}]}),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_policy(lab: Lab, what: str) -> None:
    """Refused by the API, or else: it says what is wrong, allows nothing by accident, and its neighbours work."""
    path, spec = BAD[what]
    victim = {"podSelector": {"matchLabels": {"app": "stranger"}}} if path == POLICIES else {
        "endpointSelector": {"matchLabels": {"app": "stranger"}}}  # fmt: skip
    kind = "NetworkPolicy" if path == POLICIES else "CiliumNetworkPolicy"
    group = path.removeprefix("/apis/").split("/namespaces")[0]
    body = {"apiVersion": group, "kind": kind, "metadata": {"name": "bad"}, "spec": spec | victim}
    lab.apply(ONLY_CLIENT)
    try:
        lab.request("POST", path, body)
    except ApiError as error:
        assert len(str(error)) < 600 and "\n" not in str(error), error
        refused = True
    else:
        refused = False
    if not refused:
        lab.wait("the agent says so", lambda: _said(lab))
        (address,) = [a for a in lab.addresses("stranger") if "." in a]
        lab.wait("the pod is closed", lambda: lab.probe("near", "icmp", address, "--timeout", "300")["result"] != "ok")
    if not refused and path == CILIUM:

        def condition() -> str:
            conditions = lab.request("GET", f"{CILIUM}/bad").get("status", {}).get("conditions", ())
            return str(next((c["message"] for c in conditions if c["type"] == "Valid" and c["status"] == "False"), ""))

        assert lab.wait("its status says so", condition)
    assert all(connects(lab, "client", a) for a in lab.addresses("near"))
    lab.wait("neighbours' policies are enforced", lambda: result(lab, "stranger", lab.addresses("far")[0]) != "ok")


def _said(lab: Lab) -> bool:
    return any("bad" in name for name in agent(lab, "node1", "status")["policy_problems"])


def test_bad_yaml(lab: Lab) -> None:
    with pytest.raises(LabError, match="manifest"):
        lab.apply("kind: [")
