"""Agents are replaced, killed and taken away while everything talks to everything: nothing may be lost.

A loss is a connection, a request or a datagram without an answer, or one that was answered only because a segment was
sent again that the other end hadn't got. Pods that are born meanwhile may have to wait, but each of them works.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.cluster.bed import BedError, Cluster
from tests.cluster.bed.install import NAMESPACE
from tests.cluster.traffic.births import Births
from tests.cluster.traffic.generator import NAMESPACE as TRAFFIC
from tests.cluster.traffic.generator import Traffic, Watched
from tests.cluster.traffic.release import AGENTS, OPERATORS, Release

from fimbria.release import RELEASE as VERSION

pytestmark = pytest.mark.timeout(600)
NEXT = f"{VERSION}-next"
NEW_IMAGE: dict[str, Any] = {"image": {"tag": NEXT}}
BEFORE = 4  # seconds of calm, so that what was wrong already isn't put down to the test
SETTLE = 3
AWAY = 90  # seconds without agents


@pytest.fixture(scope="module")
def traffic(cluster: Cluster) -> Iterator[Traffic]:
    cluster.load_images("fimbria-next")
    traffic = Traffic(cluster)
    try:
        traffic.start()
        yield traffic
    finally:
        traffic.stop()


@pytest.fixture
def release(cluster: Cluster, traffic: Traffic) -> Iterator[Release]:
    release = Release(cluster)
    release.wait()
    with release.restored():
        yield release


def undisturbed(traffic: Traffic, label: str, work: Callable[[Watched], None], pause: float = 2.0) -> None:
    """Nothing is lost and no pod is born broken while `work` runs."""
    tag = str(time.time_ns() // 10**6 % 10**8)
    with Births(traffic, tag, pause=pause) as births, traffic.watch(label) as seen:
        time.sleep(BEFORE)
        seen.mark("begins")
        began = time.time()
        work(seen)
        ended = time.time()
        seen.mark("is done")
        time.sleep(SETTLE)
    print(f"{seen.story()}\n{births.story(began, ended)}")
    assert not seen.verdict.losses, seen.story()
    assert births.pods and not births.broken(), births.broken()


def test_image_upgraded_and_rolled_back(traffic: Traffic, release: Release) -> None:
    before = release.revision()

    def upgrade(seen: Watched) -> None:
        release.upgrade(NEW_IMAGE)
        seen.mark("helm is done")
        release.wait()

    def rollback(seen: Watched) -> None:
        release.rollback(before)
        seen.mark("helm is done")
        release.wait()

    undisturbed(traffic, "upgrade", upgrade)
    assert set(release.tags().values()) == {NEXT}
    undisturbed(traffic, "rollback", rollback)
    assert NEXT not in release.tags().values()


CHANGES: dict[str, dict[str, Any]] = {
    "maps": {"extraConfig": {"conntrack-entries": 200000, "nat-entries": 100000, "service-entries": 4000}},
    "programs": {"extraConfig": {"trace-interval": 1.5}},
    "services by packet in pods": {"socketLB": {"hostNamespaceOnly": True}},
    "answers go directly": {"loadBalancer": {"mode": "dsr"}},
    "XDP": {"loadBalancer": {"acceleration": "native"}},
    "Maglev": {"loadBalancer": {"algorithm": "maglev"}},
}


@pytest.mark.long
@pytest.mark.parametrize("change", list(CHANGES))
def test_settings_change_and_change_back(traffic: Traffic, release: Release, change: str) -> None:
    """Other map sizes, other programs, other ways of forwarding: the same swap, at once on neither node."""
    before = release.revision()

    def there_and_back(seen: Watched) -> None:
        release.upgrade(NEW_IMAGE | CHANGES[change])
        seen.mark("helm is done")
        release.wait()
        seen.mark("all agents have changed")
        release.rollback(before)
        release.wait()

    undisturbed(traffic, change, there_and_back)


@pytest.mark.long
def test_restarted(traffic: Traffic, release: Release, cluster: Cluster) -> None:
    def restart(seen: Watched) -> None:
        cluster.kubectl("-n", NAMESPACE, "rollout", "restart", AGENTS, OPERATORS)
        time.sleep(1)
        release.wait()

    undisturbed(traffic, "kubectl rollout restart", restart)


def test_killed_and_deleted(traffic: Traffic, release: Release, cluster: Cluster) -> None:
    """As the kernel's OOM killer does it, and as somebody in a hurry."""

    def kill(seen: Watched) -> None:
        for node in traffic.nodes:
            release.kill(node)
            seen.mark(f"the agent of {node} was killed and is back")
        for node in traffic.nodes:
            pod = release.agents()[node]["metadata"]["name"]
            cluster.kubectl("-n", NAMESPACE, "delete", "pod", pod, "--grace-period=0", "--force")
            release.until(lambda n=node: release.ready(n), 90, f"the agent of {node} is back")
            seen.mark(f"the agent's pod of {node} was deleted and is back")

    undisturbed(traffic, "kill -9, delete --force", kill)


@pytest.mark.long
def test_image_that_cannot_start(traffic: Traffic, release: Release, cluster: Cluster) -> None:
    """The rollout stops at the first node; the other one goes on with its agent, both with their traffic."""
    before = release.revision()

    def bad(seen: Watched) -> None:
        release.upgrade({"image": {"tag": "isn-t-there", "pullPolicy": "Never"}})
        release.until(lambda: "isn-t-there" in release.tags().values(), 60, "the first agent is replaced")
        time.sleep(20)
        assert sorted(release.tags().values()) != ["isn-t-there"] * 2, "the rollout went on"
        with pytest.raises(BedError):
            cluster.kubectl("-n", NAMESPACE, "rollout", "status", AGENTS, "--timeout=5s")
        good = [n for n in traffic.nodes if release.ready(n)]
        assert len(good) == len(traffic.nodes) - 1
        seen.mark(f"stopped: {release.tags()}")
        release.rollback(before)
        release.wait()

    undisturbed(traffic, "an image that isn't there", bad)


@pytest.mark.long
def test_agents_away(traffic: Traffic, release: Release) -> None:
    """No agent on any node, for a while; pods wait for them. Nodes aren't given up: their pods stay and talk."""
    before = release.revision()

    def away(seen: Watched) -> None:
        release.upgrade({"nodeSelector": {"fimbria.invalid/nowhere": "true"}})
        release.until(lambda: not release.agents(), 90, "agents are gone")
        seen.mark("no agent is there any more")
        time.sleep(AWAY)
        release.rollback(before)
        release.wait()

    undisturbed(traffic, f"no agents for {AWAY} s", away, pause=10)


@pytest.mark.long
def test_two_releases_at_once(traffic: Traffic, release: Release, cluster: Cluster) -> None:
    """One node's agent is newer than the other's, the operator newer than both, then older than one."""
    first, second = traffic.nodes[:2]

    def mixed(seen: Watched) -> None:
        release.upgrade(NEW_IMAGE | {"updateStrategy": {"type": "OnDelete", "rollingUpdate": None}})
        release.wait(agents=False)
        seen.mark(f"newer operators: {release.tags()}")
        _replace(release, second)
        seen.mark(f"agents of two releases: {release.tags()}")
        assert release.tags() == {first: VERSION, second: NEXT}
        _labels_work(cluster, first, second)
        image = release.agents()[first]["spec"]["containers"][0]["image"]
        cluster.kubectl("-n", NAMESPACE, "set", "image", OPERATORS, f"operator={image}")
        release.wait(agents=False)
        seen.mark("older operators, one newer agent")
        _labels_work(cluster, second, first)
        _replace(release, first)
        seen.mark(f"older operators, newer agents: {release.tags()}")
        assert set(release.tags().values()) == {NEXT}

    undisturbed(traffic, "two releases", mixed)


def _replace(release: Release, node: str) -> None:
    old = release.agents()[node]["metadata"]["name"]
    release.cluster.kubectl("-n", NAMESPACE, "delete", "pod", old)

    def replaced() -> bool:
        now = release.agents().get(node)
        return now is not None and now["metadata"]["name"] != old and release.ready(node)

    release.until(replaced, 90, f"{node} has a new agent")


def _labels_work(cluster: Cluster, server: str, client: str) -> None:
    """A policy by labels that are new to the cluster holds between the releases, for whom it allows and for others."""
    cluster.kubectl("-n", TRAFFIC, "delete", "pod,networkpolicy", "-l", "fimbria.invalid/mixed", "--wait=true")
    mark = str(time.time_ns())
    pods = [_agnhost(f"mixed-{r}", n, mark, r) for r, n in (("server", server), ("friend", client), ("foe", client))]
    cluster.kubectl("apply", "-f", "-", stdin="\n---\n".join(json.dumps(o) for o in [_policy(mark), *pods]))
    mine = f"fimbria.invalid/mixed={mark}"
    cluster.kubectl("-n", TRAFFIC, "wait", "pod", "-l", mine, "--for=condition=Ready", "--timeout=90s")
    address = cluster.get("pod", "-n", TRAFFIC, "mixed-server")["status"]["podIP"]
    deadline = time.monotonic() + 30
    while not _reaches(cluster, "mixed-friend", address):
        assert time.monotonic() < deadline, "who is allowed never got through"
    assert not _reaches(cluster, "mixed-foe", address)
    cluster.kubectl("-n", TRAFFIC, "delete", "pod,networkpolicy", "-l", "fimbria.invalid/mixed", "--wait=false")


def _reaches(cluster: Cluster, pod: str, address: str) -> bool:
    try:
        cluster.kubectl("-n", TRAFFIC, "exec", pod, "--", "/agnhost", "connect", "--timeout=2s", f"{address}:9000")
    except BedError:
        return False
    return True


def _policy(mark: str) -> dict[str, Any]:
    friend = {"podSelector": {"matchLabels": {"mixed": f"friend-{mark}"}}}
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": "mixed", "namespace": TRAFFIC, "labels": {"fimbria.invalid/mixed": mark}},
        "spec": {"podSelector": {"matchLabels": {"mixed": f"server-{mark}"}}, "ingress": [{"from": [friend]}]},
    }  # fmt: skip


def _agnhost(name: str, node: str, mark: str, role: str) -> dict[str, Any]:
    from tests.cluster.images.recipes import recipes

    (image, *_) = recipes()["agnhost"].references
    command = ["/agnhost", "netexec", "--http-port=9000", "--udp-port=-1"]
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": TRAFFIC,
                     "labels": {"fimbria.invalid/mixed": mark, "mixed": f"{role}-{mark}"}},
        "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0,
                 "containers": [{"name": "main", "image": image, "command": command}]},
    }  # fmt: skip
