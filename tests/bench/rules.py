"""iptables rules in the shape that kube-proxy gives them: one chain a Service, one a backend, masquerading by a mark.
Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

MARK: Final = "0x4000"
PORT: Final = 80


def address(number: int) -> str:
    """The cluster address of a Service; numbers from 1 to 65,000. The first 256 are left to the cluster itself."""
    number += 256
    return f"10.96.{number >> 8}.{number & 255}"


def kube_proxy(services: int, backend: str, pods: str, port: int = 9000) -> str:
    """Input of iptables-restore: `services` Services, number N at `address(N)`, each with one backend, the pod at
    `backend`. The Service with the highest number comes last."""
    return "\n".join([*_filter(), *_nat(services, backend, pods, port)]) + "\n"


def _filter() -> Iterator[str]:
    yield "*filter"
    yield ":KUBE-FORWARD - [0:0]"
    yield "-A FORWARD -j KUBE-FORWARD"
    yield "-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP"
    yield f"-A KUBE-FORWARD -m mark --mark {MARK}/{MARK} -j ACCEPT"
    yield "-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"
    yield "COMMIT"


def _nat(services: int, backend: str, pods: str, port: int) -> Iterator[str]:
    yield "*nat"
    yield from (f":{chain} - [0:0]" for chain in ("KUBE-SERVICES", "KUBE-MARK-MASQ", "KUBE-POSTROUTING"))
    for n in range(1, services + 1):
        yield f":KUBE-SVC-{n:016X} - [0:0]"
        yield f":KUBE-SEP-{n:016X} - [0:0]"
    yield "-A PREROUTING -j KUBE-SERVICES"
    yield "-A OUTPUT -j KUBE-SERVICES"
    yield "-A POSTROUTING -j KUBE-POSTROUTING"
    yield f"-A KUBE-MARK-MASQ -j MARK --set-xmark {MARK}/{MARK}"
    yield f"-A KUBE-POSTROUTING -m mark ! --mark {MARK}/{MARK} -j RETURN"
    yield "-A KUBE-POSTROUTING -j MASQUERADE --random-fully"
    for n in range(1, services + 1):
        vip, chain = address(n), f"{n:016X}"
        yield f"-A KUBE-SERVICES -d {vip}/32 -p tcp -m tcp --dport {PORT} -j KUBE-SVC-{chain}"
        yield f"-A KUBE-SVC-{chain} ! -s {pods} -d {vip}/32 -p tcp -m tcp --dport {PORT} -j KUBE-MARK-MASQ"
        yield f"-A KUBE-SVC-{chain} -j KUBE-SEP-{chain}"
        yield f"-A KUBE-SEP-{chain} -s {backend}/32 -j KUBE-MARK-MASQ"
        yield f"-A KUBE-SEP-{chain} -p tcp -m tcp -j DNAT --to-destination {backend}:{port}"
    yield "COMMIT"
