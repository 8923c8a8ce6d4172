"""Real SCTP associations through Services and masquerading, where checksums and ports change.

Needs a kernel with SCTP: `python tests/vm/run.py --kernel 6.12 -- python -m pytest tests/bpf/test_sctp_traffic.py`, as
tests/vm/test_vm.py does.
"""

import socket
import subprocess
from collections.abc import Iterator

import pytest

from fimbria.kernel.probe import has_tcx
from lab import WORLD_ADDR, Lab, Mode, Space, lab

SCTP, TCP = socket.IPPROTO_SCTP, socket.SOCK_STREAM
PORT, SERVER_PORT = 80, 8080
FRONT = {4: "10.96.0.10", 6: "fd96::10"}


def kernel_has_sctp() -> bool:
    subprocess.run(["modprobe", "-q", "sctp"], check=False)
    try:
        socket.socket(socket.AF_INET, TCP, SCTP).close()
    except OSError:
        return False
    return True


pytestmark = pytest.mark.skipif(not kernel_has_sctp(), reason="this kernel has no SCTP: run it by tests/vm/run.py")


@pytest.fixture(scope="module", params=[True, False], ids=["overlay", "native"])
def net(request: pytest.FixtureRequest) -> Iterator[Lab]:
    with lab(Mode(overlay=request.param, tcx=has_tcx())) as built:
        yield built


def associate(server: Space, client: Space, family: int, ends: tuple[str, str], called: tuple[str, int]) -> str:
    """An association that carries data there and back; returns the client's address as the server saw it."""
    backend, own = ends
    payload = bytes(range(256)) * 20
    with server.socket(family, TCP, SCTP) as listener, client.socket(family, TCP, SCTP) as c:
        for s in (listener, c):
            s.settimeout(30)
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((backend, SERVER_PORT))
        listener.listen()
        # Bound, so that it announces no other address of its host: NAT doesn't reach into an INIT.
        c.bind((own, 0))
        c.connect(called)
        assert c.getpeername()[:2] == called
        served, peer = listener.accept()
        with served:
            served.settimeout(30)
            for a, b in ((c, served), (served, c)):
                a.sendall(payload)
                got = b""
                while len(got) < len(payload):
                    got += b.recv(65536)
                assert got == payload
        return str(peer[0])


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("offload", [True, False], ids=["sums-left-to-devices", "summed"])
def test_through_a_service(net: Lab, family: int, offload: bool) -> None:
    a, c = net.pod("a"), net.pod("c")
    for pod in (a, c):
        pod.space.checksum_offload("eth0", offload)
    net.nodes[0].dp.service(5, FRONT[family], PORT, SCTP, [(c.addr[family], SERVER_PORT)])
    ends = (c.addr[family], a.addr[family])
    assert associate(c.space, a.space, family, ends, (FRONT[family], PORT)) == a.addr[family]


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("offload", [True, False], ids=["sums-left-to-devices", "summed"])
def test_masqueraded(net: Lab, family: int, offload: bool) -> None:
    a = net.pod("a")
    for space, device in ((a.space, "eth0"), (net.fabric, "n1")):
        space.checksum_offload(device, offload)
    world = WORLD_ADDR[family]
    ends = (world, a.addr[family])
    assert associate(net.fabric, a.space, family, ends, (world, SERVER_PORT)) == net.nodes[0].addr[family]
