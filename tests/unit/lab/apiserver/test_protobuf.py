from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.lab.apiserver.protobuf import MAGIC, decode_object


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: bytes | int | str) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    raw = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(raw)) + raw


def envelope(version: str, kind: str, raw: bytes) -> bytes:
    return MAGIC + field(1, field(1, version) + field(2, kind)) + field(2, raw)


def test_pod() -> None:
    port = field(3, 80) + field(4, "TCP") + field(1, "")
    probe = field(1, field(2, field(1, "/") + field(2, field(1, 1) + field(2, 0) + field(3, "web")))) + field(3, 5)
    limits = field(1, "cpu") + field(2, field(1, "100m"))
    container = field(1, "c") + field(6, port) + field(11, probe) + field(8, field(1, limits))
    raw = field(1, field(1, "p") + field(11, field(1, "a") + field(2, "b"))) + field(
        2, field(2, container) + field(4, 30)
    )
    pod = decode_object(envelope("v1", "Pod", raw))
    assert pod["metadata"] == {"name": "p", "labels": {"a": "b"}} and pod["spec"]["terminationGracePeriodSeconds"] == 30
    found = pod["spec"]["containers"][0]
    assert found["ports"] == [{"containerPort": 80, "protocol": "TCP"}]
    assert found["readinessProbe"] == {"httpGet": {"path": "/", "port": "web"}, "timeoutSeconds": 5}
    assert found["resources"] == {"limits": {"cpu": "100m"}}


def test_times_and_bytes() -> None:
    secret = decode_object(envelope("v1", "Secret", field(2, field(1, "k") + field(2, b"\xff"))))
    assert secret["data"] == {"k": "/w=="}
    moment = field(1, 1767225600) + field(2, 5000)
    lease = decode_object(envelope("coordination.k8s.io/v1", "Lease", field(2, field(3, moment))))
    assert lease["spec"]["acquireTime"] == "2026-01-01T00:00:00.000005Z"


def test_what_it_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="can't be sent as protobuf"):
        decode_object(envelope("apiextensions.k8s.io/v1", "CustomResourceDefinition", b""))
    with pytest.raises(ValueError, match="unknown protobuf field 99"):
        decode_object(envelope("v1", "Pod", field(99, "x")))


@given(st.binary(max_size=60))
def test_garbage_is_a_value_error(raw: bytes) -> None:
    for body in (raw, MAGIC + raw, envelope("v1", "Pod", raw), envelope("v1", "Service", field(2, raw))):
        try:
            decode_object(body)
        except (ValueError, OverflowError):
            continue
