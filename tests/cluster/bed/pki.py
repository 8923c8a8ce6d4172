"""Certificates and kubeconfigs of a cluster, by openssl. Each file is made once."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from pathlib import Path

from tests.cluster.bed.layout import API_ADDRESS, API_PORT, Layout, addresses, node_name
from tests.cluster.bed.processes import run

DAYS = "30"
ADMIN, MANAGER, SCHEDULER = "admin", "controller-manager", "scheduler"
KUBELET_CLIENT, FRONT_PROXY = "kubelet-client", "front-proxy-client"
_CURVE = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
_SUBJECTS = {
    ADMIN: "/O=system:masters/CN=admin",
    MANAGER: "/CN=system:kube-controller-manager",
    SCHEDULER: "/CN=system:kube-scheduler",
    KUBELET_CLIENT: "/O=system:masters/CN=kube-apiserver-kubelet-client",
}


def ensure(layout: Layout) -> None:
    """Authorities, the API server's and the control plane's certificates, the key of service accounts."""
    layout.pki.mkdir(mode=0o700, exist_ok=True)
    for authority in ("ca", "front-proxy-ca"):
        _authority(layout.pki, authority)
    _service_account_key(layout.pki)
    _certificate(layout.pki, "apiserver", "/CN=kube-apiserver", _api_names())
    for name, subject in _SUBJECTS.items():
        _certificate(layout.pki, name, subject)
    _certificate(layout.pki, FRONT_PROXY, "/CN=front-proxy-client", authority="front-proxy-ca")
    for name in (ADMIN, MANAGER, SCHEDULER):
        path = layout.kubeconfig if name == ADMIN else layout.state / f"{name}.kubeconfig"
        write_private(path, kubeconfig(layout.pki, name))


def ensure_node(layout: Layout, number: int) -> None:
    """One certificate is both the kubelet's own and what it shows to the API server (Node authorization)."""
    node = node_name(number)
    at = addresses(node)
    names = [f"DNS:{node}", "IP:127.0.0.1", f"IP:{at.ipv4}", f"IP:{at.ipv6}"]
    _certificate(layout.pki, node, f"/O=system:nodes/CN=system:node:{node}", names)


def kubeconfig(pki: Path, user: str) -> str:
    """As JSON, which is YAML; everything inline."""
    cluster = {"server": f"https://{API_ADDRESS}:{API_PORT}", "certificate-authority-data": _inline(pki / "ca.crt")}
    keys = {
        "client-certificate-data": _inline(pki / f"{user}.crt"),
        "client-key-data": _inline(pki / f"{user}.key"),
    }
    return json.dumps(
        {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "bed", "cluster": cluster}],
            "users": [{"name": user, "user": keys}],
            "contexts": [{"name": "bed", "context": {"cluster": "bed", "user": user}}],
            "current-context": "bed",
        },
        indent=1,
    )


def write_private(path: Path, text: str) -> None:
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(text)


def _api_names() -> list[str]:
    at = addresses("control")
    service = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", "kubernetes.default.svc.cluster.local"]
    ips = ["127.0.0.1", "::1", "10.96.0.1", "fd00:10:96::1", str(at.ipv4), str(at.ipv6)]
    return ["DNS:localhost", *(f"DNS:{name}" for name in service), *(f"IP:{ip}" for ip in ips)]


def _authority(pki: Path, name: str) -> None:
    crt, key = pki / f"{name}.crt", pki / f"{name}.key"
    if not crt.exists():
        run(
            [
                "openssl",
                "req",
                "-x509",
                *_CURVE,
                "-days",
                DAYS,
                "-subj",
                f"/CN={name}",
                "-addext",
                "keyUsage=critical,keyCertSign,cRLSign,digitalSignature",
                "-keyout",
                str(key),
                "-out",
                str(crt),
            ]
        )


def _service_account_key(pki: Path) -> None:
    if not (pki / "sa.pub").exists():
        run(["openssl", "genrsa", "-out", str(pki / "sa.key"), "2048"])
        run(["openssl", "rsa", "-in", str(pki / "sa.key"), "-pubout", "-out", str(pki / "sa.pub")])


def _certificate(pki: Path, name: str, subject: str, names: Sequence[str] = (), authority: str = "ca") -> None:
    crt, key, request, extensions = (pki / f"{name}.{end}" for end in ("crt", "key", "csr", "ext"))
    if crt.exists():
        return
    alternative = f"subjectAltName={','.join(names)}\n" if names else ""
    extensions.write_text(f"extendedKeyUsage=serverAuth,clientAuth\n{alternative}")
    run(["openssl", "req", *_CURVE, "-subj", subject, "-keyout", str(key), "-out", str(request)])
    made = crt.with_suffix(".new")
    run(
        [
            "openssl",
            "x509",
            "-req",
            "-in",
            str(request),
            "-CA",
            str(pki / f"{authority}.crt"),
            "-CAkey",
            str(pki / f"{authority}.key"),
            "-days",
            DAYS,
            "-extfile",
            str(extensions),
            "-out",
            str(made),
        ]
    )
    made.rename(crt)
    request.unlink()
    extensions.unlink()


def _inline(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()
