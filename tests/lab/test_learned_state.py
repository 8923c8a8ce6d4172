"""What the kernel learned is collected while it is in use: source ports come back, living connections are never cut."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from traffic import pod

from fimbria.lab import kernel
from fimbria.lab.handle import Lab

pytestmark = pytest.mark.timeout(600)
PORTS, BURST, SERVER = 400, 330, 7000
RUNS = 'fimbria_map_gc_runs_total{map_name="nat",status="completed"}'
# One connection that stays, mostly silent; around it bursts of others, open until the next line. Prints how many of
# each burst succeeded.
CLIENT = """
import json, socket, sys
address, port, burst = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
def ask(s):
    s.send(b"who\\n")
    return len(s.recv(1000)) > 0
kept = socket.create_connection((address, port), timeout=3)
for line in sys.stdin:
    fine, others = 0, []
    for _ in range(burst if line == "open\\n" else 0):
        try:
            others.append(socket.create_connection((address, port), timeout=7.5))
            fine += ask(others[-1])
        except OSError:
            pass
    print(json.dumps({"fine": fine, "kept": ask(kept)}), flush=True)
"""


@pytest.fixture(scope="module")
def lab(make_lab: Callable[..., Lab]) -> Iterator[Lab]:
    made = make_lab(nodes=1, agent_options=(f"masquerade-ports=61000-{61000 + PORTS - 1}",))
    made.apply(pod("client", "node1", sleeps=True))
    made.wait_ready(["client"])
    server = made.start("node/world", kernel.binary("labtool"), "serve", "--tcp", str(SERVER))
    try:
        yield made
    finally:
        server.kill()
        server.wait()


def metric(lab: Lab, name: str) -> float:
    lines = lab.run("node/node1", "fimbria", "metrics", name.partition("{")[0]).stdout.splitlines()
    return float(next((line.rsplit(" ", 1)[1] for line in lines if line.startswith(name)), "nan"))


@pytest.mark.parametrize("family", [4, 6])
def test_source_ports_come_back_and_a_silent_connection_stays(lab: Lab, family: int) -> None:
    address = lab.spec.world.ipv4 if family == 4 else lab.spec.world.ipv6
    runs = metric(lab, RUNS) + 1
    # A walk that began after what was before.
    lab.wait("nothing is in use", lambda: metric(lab, RUNS) > runs and metric(lab, "fimbria_nat_ports_used") < 5, 120)
    argv = lab.argv("client", sys.executable, "-u", "-c", CLIENT, address, str(SERVER), str(BURST))
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
        assert client.stdin is not None and client.stdout is not None

        def tell(what: str) -> dict[str, int]:
            assert client.stdin is not None and client.stdout is not None
            client.stdin.write(what + "\n")
            client.stdin.flush()
            found: dict[str, int] = json.loads(client.stdout.readline())
            return found

        try:
            assert tell("open") == {"fine": BURST, "kept": True}
            lab.wait("ports in use are seen", lambda: metric(lab, "fimbria_nat_ports_used") > BURST, 120)
            where = f"{f'[{address}]' if family == 6 else address}:{SERVER}"
            words = f"nearly out of source ports towards TCP {where}"
            lab.wait("the log says so", lambda: words in lab.process_log("node1/agent"))
            assert tell("close") == {"fine": 0, "kept": True}
            lab.wait("they come back", lambda: metric(lab, "fimbria_nat_ports_used") == 1, 120)
            assert tell("open") == {"fine": BURST, "kept": True}
        finally:
            client.stdin.close()
            client.kill()
