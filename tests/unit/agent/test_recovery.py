"""Who must agree on an endpoint that the journal has lost."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest

from fimbria.agent.endpoints import host_ifname
from fimbria.agent.recovery import Lost, Unknown, agree, find
from fimbria.kernel.link import Device
from fimbria.model.address import pack
from fimbria.model.endpoint import HostPort
from fimbria.model.rows import Endpoint
from fimbria.sources.k8s.types.cilium import CiliumEndpoint
from fimbria.sources.k8s.types.core import Pod

NAME = host_ifname("abc123/eth0")
DEVICE = Device(7, NAME, "veth", 1450, bytes(6), 0, 0, 0, 2, 1, 0, "fimbria: ns/web-0", 0, 0, 0, 0)
ROW = Endpoint(41, 300, 2, 1, pack("10.0.0.5"), pack("fd00::5"), b"\2pod..", b"\2host.")
LOST = Lost(DEVICE, "ns", "web-0", ROW)
REPORT = b"""{"metadata": {"name": "web-0", "namespace": "ns"}, "status": {
  "id": 41, "identity": {"id": 300, "labels": ["k8s:app=web", "k8s:empty="]},
  "external-identifiers": {"container-id": "abc123", "cni-attachment-id": "abc123:eth0"},
  "networking": {"addressing": [{"ipv4": "10.0.0.5", "ipv6": "fd00::5"}], "node": "172.31.1.10"}}}"""
POD = b"""{"metadata": {"name": "web-0", "namespace": "ns", "uid": "u-1"}, "spec": {"containers": [{"ports": [
  {"containerPort": 80, "hostPort": 8080, "protocol": "TCP"}, {"containerPort": 53, "protocol": "UDP"},
  {"containerPort": 90, "hostPort": 8081, "hostIP": "172.31.1.10", "protocol": "UDP"}]}]}}"""


def report(**changes: str) -> CiliumEndpoint:
    text = REPORT.decode()
    for old, new in changes.items():
        text = text.replace(old.replace("_", "-"), new)
    return msgspec.json.decode(text, type=CiliumEndpoint)


def pod(text: bytes = POD) -> Pod:
    return msgspec.json.decode(text, type=Pod)


def test_all_agree() -> None:
    endpoint, identity = agree(LOST, report(), pod(), "/run/netns/cni-1")
    assert (endpoint.id, endpoint.owner, endpoint.ifindex, endpoint.host_ifname) == (41, "abc123/eth0", 7, NAME)
    assert (endpoint.label, endpoint.uid, endpoint.netns) == ("ns/web-0", "u-1", "/run/netns/cni-1")
    assert endpoint.addrs == (pack("10.0.0.5"), pack("fd00::5")) and endpoint.pod_mac == ROW.pod_mac
    assert endpoint.host_ports == (HostPort(8080, 80, 6), HostPort(8081, 90, 17, pack("172.31.1.10")))
    assert identity.number == 300 and identity.labels == {"k8s:app": "web", "k8s:empty": ""}


def test_a_static_pods_uid_is_the_one_that_its_runtime_knows() -> None:
    mirror = POD.replace(b'"uid": "u-1"', b'"uid": "u-1", "annotations": {"kubernetes.io/config.mirror": "hash"}')
    assert agree(LOST, report(), pod(mirror), "")[0].uid == "hash"


@pytest.mark.parametrize(("lost", "found", "said"), [
    (LOST, report(abc123="another"), "another attachment"),
    (replace(LOST, device=replace(DEVICE, name="fim00000000000")), report(), "another attachment"),
    (LOST, report(**{"10.0.0.5": "10.0.0.6"}), "other addresses"),
    (replace(LOST, row=replace(ROW, addr6=bytes(16))), report(), "other addresses"),
    (replace(LOST, row=replace(ROW, identity=301)), report(), "identity 300, the kernel 301"),
])  # fmt: skip
def test_they_do_not(lost: Lost, found: CiliumEndpoint, said: str) -> None:
    with pytest.raises(Unknown, match=said):
        agree(lost, found, pod(), "")


def test_a_host_port_at_no_address() -> None:
    with pytest.raises(Unknown, match=r"host port.*nowhere"):
        agree(LOST, report(), pod(POD.replace(b"172.31.1.10", b"nowhere")), "")


def test_whose_interfaces_are_looked_at() -> None:
    rows = {7: ROW}
    assert find([DEVICE], set(), rows) == [LOST]
    assert find([DEVICE], {7}, rows) == [], "it has an endpoint"
    assert find([DEVICE], set(), {}) == [], "its ADD was never finished"
    for other in ({"name": "fimbria_host"}, {"name": "veth0"}, {"alias": ""}, {"alias": "fimbria: container abc"}):
        assert find([replace(DEVICE, **other)], set(), rows) == []  # type: ignore[arg-type]
