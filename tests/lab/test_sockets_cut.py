"""A resolver's connected UDP socket isn't left with a server that its Service has lost: real programs, agent and pods.

The servers play CoreDNS: they answer each datagram with their name. The client plays a resolver that keeps its socket.
"""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from traffic import UDP, cluster_ips, pod

from fimbria.lab.handle import Lab

pytestmark = pytest.mark.timeout(300)
SERVICE = """
apiVersion: v1
kind: Service
metadata: {name: servers}
spec:
  ipFamilyPolicy: PreferDualStack
  selector: {app: server}
  ports: [{name: tcp, port: 9000}, {name: udp, port: 9001, protocol: UDP}]
"""
# Asks every 2 ms over one connected socket for as long as it works; prints who answered, when it had to connect anew.
RESOLVER = """
import json, signal, socket, sys, time
address, port, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
going = True
def stop(*_):
    global going
    going = False
signal.signal(signal.SIGTERM, stop)
names, errors, reconnects, gap, s, last = {}, [], [], 0.0, None, time.time()
while going:
    try:
        if s is None:
            s = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
            s.settimeout(2)
            s.connect((address, port))
        s.send(b"who\\n")
        name = json.loads(s.recv(2000))["name"]
        if not names:
            print("begun", flush=True)
        names[name] = time.time()
        gap, last = max(gap, time.time() - last), time.time()
        time.sleep(0.002)
    except OSError as error:
        errors.append(type(error).__name__)
        reconnects.append(time.time())
        s.close()
        s = None
        time.sleep(0.005)
print(json.dumps({"names": names, "errors": errors, "reconnects": reconnects, "gap": gap}))
"""


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    made = make_lab(nodes=2)
    made.apply(pod("client", "node1", sleeps=True) + pod("one", "node1", "server") + pod("two", "node2", "server"))
    made.apply(SERVICE)
    made.wait_ready(["client", "one", "two"])
    return made


@contextmanager
def resolver(lab: Lab, where: str, address: str, port: int = UDP, kind: str = "udp") -> Iterator[dict[str, Any]]:
    """Runs during the body; what it saw is in the yielded dict afterwards."""
    seen: dict[str, Any] = {}
    process = subprocess.Popen(
        lab.argv(where, sys.executable, "-c", RESOLVER, address, str(port), kind), stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "begun\n"
        yield seen
    finally:
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=10)
        seen.update(json.loads(out))


def label(lab: Lab, name: str, app: str) -> float:
    """Puts a pod into the Service or out of it; it goes on answering. Returns when that was asked for."""
    asked = time.time()
    patch, path = {"metadata": {"labels": {"app": app}}}, f"/api/v1/namespaces/default/pods/{name}"
    lab.call(lambda c: c.request("PATCH", path, patch, "application/merge-patch+json"))
    return asked


def backends(lab: Lab, node: str = "node1") -> int:
    raw = lab.run(f"node/{node}", "fimbria", "service", "list", "-o", "json").stdout
    return max(len(s["backends"]) for s in json.loads(raw) if s["service"] == "default/servers")


def only(lab: Lab, name: str) -> None:
    """Makes one server the Service's only backend."""
    for each in ("one", "two"):
        label(lab, each, "server" if each == name else "other")
    lab.wait("one backend is left", lambda: backends(lab) == 1)


@pytest.mark.parametrize("where", ["client", "node/node1"])
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_a_connected_resolver_moves_to_a_living_server(lab: Lab, where: str, family: int) -> None:
    only(lab, "one")
    with resolver(lab, where, cluster_ips(lab)[family]) as seen:
        label(lab, "two", "server")
        lab.wait("two backends", lambda: backends(lab) == 2)
        asked = label(lab, "one", "other")
        time.sleep(1)
    assert len(seen["reconnects"]) == 1, seen
    took = seen["reconnects"][0] - asked
    print(f"cut {took * 1000:.0f} ms after the label changed; longest silence {seen['gap'] * 1000:.0f} ms")
    assert took < 1.0
    assert seen["names"]["two"] > seen["reconnects"][0]
    assert seen["names"]["one"] <= seen["reconnects"][0]
    assert seen["gap"] < 0.5


def test_direct_conversations_and_tcp_go_on(lab: Lab) -> None:
    only(lab, "one")
    tcp = UDP - 1
    address = lab.addresses("one")[0]
    with resolver(lab, "client", address) as direct, resolver(lab, "client", cluster_ips(lab)[0], tcp, "tcp") as stream:
        label(lab, "two", "server")
        lab.wait("two backends", lambda: backends(lab) == 2)
        label(lab, "one", "other")
        time.sleep(1)
    assert direct["reconnects"] == [] and set(direct["names"]) == {"one"}
    assert stream["reconnects"] == [] and set(stream["names"]) == {"one"}


def test_a_backend_that_went_while_no_agent_ran_is_noticed_at_its_start(lab: Lab) -> None:
    only(lab, "one")
    with resolver(lab, "client", cluster_ips(lab)[0]) as seen:
        lab.kill("node1/agent")
        label(lab, "two", "server")
        label(lab, "one", "other")
        time.sleep(1)
        started = time.time()
        lab.restart("node1/agent")
        lab.wait("the agent is back", lambda: lab.run("node/node1", "fimbria", "status").returncode == 0)
        time.sleep(1)
    assert [at > started for at in seen["reconnects"]] == [True]
    assert seen["names"]["one"] > started
    assert seen["names"]["two"] > seen["reconnects"][0]


def test_a_server_that_is_replaced_under_load_leaves_nobody_behind(lab: Lab) -> None:
    only(lab, "one")
    resolvers = [resolver(lab, "client", cluster_ips(lab)[n % 2]) for n in range(6)]
    found = [r.__enter__() for r in resolvers]
    try:
        lab.apply(pod("three", "node2", "server"))
        lab.wait_ready(["three"])
        lab.wait("two backends", lambda: backends(lab) == 2)
        lab.delete(pod("one", "node1", "server"))
        time.sleep(1.5)
    finally:
        for r in resolvers:
            r.__exit__(None, None, None)
    for seen in found:
        assert seen["names"]["three"] - max(seen["names"].get("one", 0), 0) > 1
        assert seen["gap"] < 1.0, seen


def test_a_service_that_is_removed_cuts_whoever_it_served(lab: Lab) -> None:
    with resolver(lab, "client", cluster_ips(lab)[0]) as seen:
        asked = time.time()
        lab.delete(SERVICE)
        time.sleep(1)
    assert seen["reconnects"][0] - asked < 1.0
    counted = lab.run("node/node1", "fimbria", "metrics", "sockets_cut").stdout
    assert "fimbria_sockets_cut_failures_total 0" in counted


def test_the_agent_says_what_it_did(lab: Lab) -> None:
    assert "sockets connected to backends that are gone were cut" in lab.process_log("node1/agent")


def test_tcp_is_reset_where_that_is_asked_for(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(nodes=1, agent_options=("reset-tcp",))
    lab.apply(pod("client", "node1", sleeps=True) + pod("one", "node1", "server") + pod("two", "node1", "server"))
    lab.apply(SERVICE)
    lab.wait_ready(["client", "one", "two"])
    only(lab, "one")
    with resolver(lab, "client", cluster_ips(lab)[0], UDP - 1, "tcp") as seen:
        label(lab, "two", "server")
        lab.wait("two backends", lambda: backends(lab) == 2)
        label(lab, "one", "other")
        time.sleep(1)
    assert len(seen["reconnects"]) == 1, seen
    assert seen["names"]["two"] > seen["reconnects"][0]
