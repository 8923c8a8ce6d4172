"""A hundred pods at once on one node: each gets its network at the first attempt, and each is gone afterwards."""

from __future__ import annotations

import time

import pytest
from tests.cluster.bed import Cluster
from tests.cluster.traffic import storm

pytestmark = [pytest.mark.timeout(900)]
COUNT = 100
NODE = "node1"


def judge(cluster: Cluster, namespace: str, *, labels_each: bool) -> None:
    before = storm.metrics(cluster, NODE)
    endpoints = storm.wait_gone(cluster, NODE, 0, patience=0)
    lines = storm.run(cluster, storm.pods(namespace, NODE, COUNT, labels_each=labels_each), "once")
    after = storm.metrics(cluster, NODE)
    print(storm.table(storm.spans(lines)))
    done = {k: n - storm.requests(before).get(k, 0) for k, n in storm.requests(after).items()}
    for command in ("ADD", "DEL"):
        took = storm.seconds(after, command) - storm.seconds(before, command)
        print(f"{command}: {done.get((command, '0'), 0)}, {took / COUNT * 1000:.0f} ms each in the agent")
    assert len(lines) == COUNT
    assert [line["name"] for line in lines if line["ready"] is None] == []
    assert [text for line in lines for text in line["refusals"]] == []
    assert {k: n for k, n in done.items() if k[1] != "0" and n} == {}, "a request failed"
    assert done["ADD", "0"] == COUNT
    assert [line["name"] for line in lines if line["gone"] is None] == []
    assert storm.wait_gone(cluster, NODE, endpoints) <= endpoints


@pytest.mark.long
def test_hundred_pods_of_one_kind(cluster: Cluster, namespace: str) -> None:
    judge(cluster, namespace, labels_each=False)


@pytest.mark.long
def test_hundred_pods_of_a_hundred_kinds(cluster: Cluster, namespace: str) -> None:
    """Each needs an identity of its own, and gets one."""
    judge(cluster, namespace, labels_each=True)
    found = storm.identities(cluster, namespace, "each")
    assert len(found) == COUNT
    assert {value: names for value, names in found.items() if len(names) != 1} == {}


@pytest.mark.long
def test_twenty_pods_on_each_node(cluster: Cluster, namespace: str) -> None:
    """The same, small: for CI."""
    began = time.time()
    manifests = [p for n in ("node1", "node2") for p in storm.pods(namespace, n, 20, tag=n, labels_each=True)]
    lines = storm.run(cluster, manifests, "once", patience=120)
    print(storm.table(storm.spans(lines)), f"{time.time() - began:.0f} s", sep="\n")
    assert [line["name"] for line in lines if line["ready"] is None or line["refusals"] or line["gone"] is None] == []
    assert len(storm.identities(cluster, namespace, "each")) == 40
