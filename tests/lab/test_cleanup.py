"""A node after `fimbria cleanup`: nothing says that Fimbria ever ran there; an agent that comes back starts anew."""

import json
import sys
from collections.abc import Callable

import pytest
from traffic import start_pods

from fimbria.lab.handle import Lab

FIMBRIA = (sys.executable, "-m", "fimbria.cli.main")
OTHERS = "/etc/cni/net.d/10-other.conflist"


@pytest.fixture(scope="module", params=["tcx", "clsact"])
def lab(request: pytest.FixtureRequest, make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab(nodes=2, agent_options=(f"attach={request.param}", "cni-exclusive"))
    start_pods(lab)
    return lab


def on_node(lab: Lab, *command: str) -> str:
    done = lab.run("node/node1", *command)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout


def left(lab: Lab) -> dict[str, list[str]]:
    """What there is of Fimbria in the kernel and in the files of a node."""
    links = [x["ifname"] for x in json.loads(on_node(lab, "ip", "-json", "link"))]
    routes = [on_node(lab, "ip", family, "route", "show", "proto", "241") for family in ("-4", "-6")]
    found = {
        "devices": [n for n in links if n.startswith("fim")],
        "routes": [line for text in routes for line in text.splitlines()],
        "files": lab.run(
            "node/node1", "sh", "-c",
            "find /sys/fs/bpf -path '*fimbria*'; find /run/fimbria -mindepth 1; find /etc/cni /opt/cni -name '*fim*'",
        ).stdout.splitlines(),
        "filters": [
            line for name in links for side in ("ingress", "egress")
            for line in on_node(lab, "sh", "-c", f"tc filter show dev {name} {side} 2>/dev/null; true").splitlines()
        ],
    }  # fmt: skip
    return {kind: rows for kind, rows in found.items() if rows}


def test_nothing_is_left_and_an_agent_starts_anew(lab: Lab) -> None:
    on_node(lab, "sh", "-c", f"echo '{{}}' > {OTHERS}")
    lab.wait(
        "the other configuration is set aside",
        lambda: _ls(lab) == ["05-fimbria.conflist", "10-other.conflist.fimbria_bak"],
    )
    assert left(lab).keys() >= {"devices", "routes", "files"}

    refused = lab.run("node/node1", *FIMBRIA, "cleanup", "--yes")
    assert refused.returncode == 1 and "stop it first" in refused.stderr

    lab.kill("node1/agent")
    lab.kill("node1/observer")
    said = on_node(lab, *FIMBRIA, "cleanup", "--yes")
    assert "10-other.conflist put back" in said, said
    assert left(lab) == {}
    assert _ls(lab) == ["10-other.conflist"]
    assert on_node(lab, *FIMBRIA, "cleanup", "--yes") == "nothing was left\n"

    on_node(lab, "rm", OTHERS)
    for process in ("node1/agent", "node1/observer"):
        lab.restart(process)
    lab.wait("ready again", lambda: lab.run("node/node1", *FIMBRIA, "status").returncode == 0)
    assert left(lab).keys() >= {"devices", "routes", "files"}


def _ls(lab: Lab) -> list[str]:
    return sorted(on_node(lab, "ls", "/etc/cni/net.d").split())
