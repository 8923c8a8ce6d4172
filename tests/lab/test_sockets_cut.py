"""A resolver's connected UDP socket isn't left with a server that its Service has lost: real programs, agent and pods.

The servers play CoreDNS: they answer each datagram with their name. The client plays a resolver that keeps its socket.
"""

import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from balance import host_of
from traffic import UDP, agent, cluster_ips, pod, starved

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
# Asks every 2 ms over one connected socket for as long as it works; says who answers whenever that is another one, when
# it had to connect anew, and at its end the longest silence, without what it waited for a processor itself.
RESOLVER = """
import json, signal, socket, sys, time
address, port, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
family = socket.AF_INET6 if ":" in address else socket.AF_INET
going = True

def stop(*_):
    global going
    going = False

def say(**what):
    print(json.dumps({"at": time.monotonic()} | what), flush=True)

def excused():
    with open("/proc/self/schedstat") as file:
        return int(file.read().split()[1]) / 1e9

signal.signal(signal.SIGTERM, stop)
names, talks_to, gap, s, last, before = {}, None, 0.0, None, time.monotonic(), excused()
while going:
    try:
        if s is None:
            s = socket.socket(family, socket.SOCK_DGRAM if kind == "udp" else socket.SOCK_STREAM)
            s.settimeout(2)
            s.connect((address, port))
        s.send(b"who\\n")
        name = json.loads(s.recv(2000))["name"]
        now, waited = time.monotonic(), excused()
        gap, last, before = max(gap, now - last - (waited - before)), now, waited
        names[name] = now
        if name != talks_to:
            talks_to = name
            say(name=name)
        time.sleep(0.002)
    except OSError as error:
        say(error=type(error).__name__)
        s.close()
        s = None
        time.sleep(0.005)
say(names=names, gap=gap)
"""


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Lab:
    made = make_lab(nodes=2)
    made.apply(pod("client", "node1", sleeps=True) + pod("one", "node1", "server") + pod("two", "node2", "server"))
    made.apply(SERVICE)
    made.wait_ready(["client", "one", "two"])
    return made


@dataclass
class Resolver:
    """A running one; `names` (last answers) and `gap` are there when it has ended. All times are of one clock, the
    machine's monotonic one."""

    path: Path
    names: dict[str, float] = field(default_factory=dict)
    gap: float = 0.0

    def said(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().rpartition("\n")[0].splitlines()]

    @property
    def talks_to(self) -> str:
        return next((str(s["name"]) for s in reversed(self.said()) if "name" in s), "")

    @property
    def reconnects(self) -> list[float]:
        return [s["at"] for s in self.said() if "error" in s]


@contextmanager
def resolver(lab: Lab, where: str, address: str, port: int = UDP, kind: str = "udp") -> Iterator[Resolver]:
    """Runs during the body."""
    with tempfile.TemporaryDirectory(prefix="fim") as folder, Path(folder, "said").open("wb") as out:
        argv = lab.argv(where, sys.executable, "-c", RESOLVER, address, str(port), kind)
        process = subprocess.Popen(argv, stdout=out)
        one = Resolver(Path(folder, "said"))
        try:
            lab.wait("it is answered", lambda: one.talks_to)
            yield one
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(20)
        end = one.said()[-1]
        one.names, one.gap = end["names"], end["gap"]


def label(lab: Lab, name: str, app: str) -> float:
    """Puts a pod into the Service or out of it; it goes on answering. Returns when that was asked for."""
    asked = time.monotonic()
    patch, path = {"metadata": {"labels": {"app": app}}}, f"/api/v1/namespaces/default/pods/{name}"
    lab.call(lambda c: c.request("PATCH", path, patch, "application/merge-patch+json"))
    return asked


def serve(lab: Lab, *names: str) -> None:
    """Waits until node1's kernel has these servers, and no others, behind every frontend of the Service."""
    wanted = {a for name in names for a in lab.addresses(name)}

    def done() -> bool:
        rows = [r["backends"] for r in agent(lab, "node1", "services") if r["service"] == "default/servers"]
        right = all(len(row) == len(names) and {host_of(b) for b in row} <= wanted for row in rows)
        return len(rows) == 4 and right and agent(lab, "node1", "plan") == []

    lab.wait(f"served by {', '.join(names)}", done)


def only(lab: Lab, name: str) -> None:
    """Makes one server the Service's only backend."""
    for each in ("one", "two"):
        label(lab, each, "server" if each == name else "other")
    serve(lab, name)


@pytest.mark.parametrize("where", ["client", "node/node1"])
@pytest.mark.parametrize("family", [0, 1], ids=["v4", "v6"])
def test_a_connected_resolver_moves_to_a_living_server(lab: Lab, where: str, family: int) -> None:
    only(lab, "one")
    with resolver(lab, where, cluster_ips(lab)[family]) as client:
        label(lab, "two", "server")
        serve(lab, "one", "two")
        before = starved(lab)
        asked = label(lab, "one", "other")
        lab.wait("it moves", lambda: client.talks_to == "two")
        excused = max(starved(lab) - before, 0.0)
        time.sleep(0.5)
        (cut,) = client.reconnects
    took = cut - asked
    print(f"cut {took * 1000:.0f} ms after the label changed; longest silence {client.gap * 1000:.0f} ms")
    assert took - excused < 1.0, (took, excused)
    assert client.names["two"] > cut
    assert client.names["one"] <= cut
    assert client.gap - excused < 0.5, (client.gap, excused)


def test_direct_conversations_and_tcp_go_on(lab: Lab) -> None:
    only(lab, "one")
    tcp = UDP - 1
    address = lab.addresses("one")[0]
    with resolver(lab, "client", address) as direct, resolver(lab, "client", cluster_ips(lab)[0], tcp, "tcp") as stream:
        label(lab, "two", "server")
        serve(lab, "one", "two")
        label(lab, "one", "other")
        serve(lab, "two")
        time.sleep(1)
        assert direct.reconnects == [] == stream.reconnects
    assert direct.names.keys() == {"one"} == stream.names.keys()


def test_a_backend_that_went_while_no_agent_ran_is_noticed_at_its_start(lab: Lab) -> None:
    only(lab, "one")
    with resolver(lab, "client", cluster_ips(lab)[0]) as client:
        lab.kill("node1/agent")
        label(lab, "two", "server")
        label(lab, "one", "other")
        time.sleep(1)
        started = time.monotonic()
        lab.restart("node1/agent")
        lab.wait("it moves", lambda: client.talks_to == "two", 60)
        time.sleep(0.5)
        (cut,) = client.reconnects
    assert cut > started
    assert client.names["one"] > started
    assert client.names["two"] > cut


def test_a_server_that_is_replaced_under_load_leaves_nobody_behind(lab: Lab) -> None:
    only(lab, "one")
    with ExitStack() as stack:
        clients = [stack.enter_context(resolver(lab, "client", cluster_ips(lab)[n % 2])) for n in range(6)]
        lab.apply(pod("three", "node2", "server"))
        lab.wait_ready(["three"])
        serve(lab, "one", "three")
        before = starved(lab)
        lab.delete(pod("one", "node1", "server"))
        lab.wait("all move", lambda: {c.talks_to for c in clients} == {"three"})
        excused = max(starved(lab) - before, 0.0)
        time.sleep(1.2)
    for client in clients:
        assert client.names["three"] - client.names.get("one", 0) > 1
        assert client.gap - excused < 1.0, (client.gap, excused)


def test_a_service_that_is_removed_cuts_whoever_it_served(lab: Lab) -> None:
    with resolver(lab, "client", cluster_ips(lab)[0]) as client:
        asked, before = time.monotonic(), starved(lab)
        lab.delete(SERVICE)
        cut, *_ = lab.wait("it is cut", lambda: client.reconnects)
        excused = max(starved(lab) - before, 0.0)
    assert cut - asked - excused < 1.0, (cut - asked, excused)
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
    with resolver(lab, "client", cluster_ips(lab)[0], UDP - 1, "tcp") as client:
        label(lab, "two", "server")
        serve(lab, "one", "two")
        label(lab, "one", "other")
        lab.wait("it moves", lambda: client.talks_to == "two")
        time.sleep(0.5)
        (cut,) = client.reconnects
    assert client.names["two"] > cut
