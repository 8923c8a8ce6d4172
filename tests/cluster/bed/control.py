"""The control plane: etcd, API server, controller-manager and scheduler in the namespace `control`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from tests.cluster.bed import pki, processes
from tests.cluster.bed.errors import BedError
from tests.cluster.bed.layout import API_ADDRESS, API_PORT, POD_RANGES, REPOSITORY, SERVICE_RANGES, Layout

ETCD, API, MANAGER, SCHEDULER = "etcd", "apiserver", "controller-manager", "scheduler"
ROUTES = "routes"
READY_SECONDS = 120.0
_AUDIT = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata"}],
}


def start_etcd(layout: Layout) -> None:
    etcd = shutil.which("etcd")
    if not etcd:
        raise BedError("etcd is missing: scripts/setup --test installs Debian's etcd-server")
    client, peer = "http://127.0.0.1:2379", "http://127.0.0.1:2380"
    processes.start(
        layout,
        "control",
        ETCD,
        [
            etcd,
            f"--data-dir={layout.disks / 'etcd'}",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--log-level=warn",
            # the data needn't survive a power cut, and syncing would slow everybody on the machine down
            "--unsafe-no-fsync",
        ],
    )


def start_api(layout: Layout, binaries: Path) -> None:
    policy = layout.state / "audit.json"
    policy.write_text(json.dumps(_AUDIT))
    processes.start(layout, "control", API, [str(binaries / "kube-apiserver"), *_api_flags(layout, policy)])


def start_controllers(layout: Layout, binaries: Path) -> None:
    manager, scheduler = (
        f"--kubeconfig={layout.state / f'{name}.kubeconfig'}" for name in (pki.MANAGER, pki.SCHEDULER)
    )
    processes.start(
        layout,
        "control",
        MANAGER,
        [
            str(binaries / "kube-controller-manager"),
            manager,
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
            f"--service-account-private-key-file={layout.pki / 'sa.key'}",
            f"--root-ca-file={layout.pki / 'ca.crt'}",
            "--use-service-account-credentials=true",
            f"--cluster-signing-cert-file={layout.pki / 'ca.crt'}",
            f"--cluster-signing-key-file={layout.pki / 'ca.key'}",
            "--allocate-node-cidrs=false",
            f"--cluster-cidr={','.join(POD_RANGES)}",
        ],
    )
    processes.start(
        layout,
        "control",
        SCHEDULER,
        [
            str(binaries / "kube-scheduler"),
            scheduler,
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
        ],
    )


def start_routes(layout: Layout) -> None:
    """What tells the control plane's network where pods are."""
    command = [sys.executable, "-m", "tests.cluster.bed.routes", str(layout.pki)]
    env = processes.environment(PYTHONPATH=os.pathsep.join([str(REPOSITORY / "src"), str(REPOSITORY)]))
    processes.start(layout, "control", ROUTES, command, env=env)


def wait_ready(layout: Layout, binaries: Path) -> None:
    """Until /readyz says ok. Raises BedError with the log's end, at once if a process has ended."""
    ask = [
        *processes.enter(layout, "control"),
        "--",
        str(binaries / "kubectl"),
        f"--kubeconfig={layout.kubeconfig}",
        "--request-timeout=2s",
        "get",
        "--raw=/readyz",
    ]

    def ready() -> bool:
        for process in (ETCD, API):
            if not processes.running(layout, "control", process):
                raise BedError(f"{process} has ended{processes.tail(layout, 'control', process)}")
        try:
            return processes.run(ask, env=processes.environment()) == "ok"
        except BedError:
            return False

    processes.wait("API server", ready, READY_SECONDS, lambda: processes.tail(layout, "control", API))


def _api_flags(layout: Layout, policy: Path) -> list[str]:
    keys = layout.pki
    return [
        "--etcd-servers=http://127.0.0.1:2379",
        "--bind-address=::",
        f"--secure-port={API_PORT}",
        f"--advertise-address={API_ADDRESS}",
        f"--tls-cert-file={keys / 'apiserver.crt'}",
        f"--tls-private-key-file={keys / 'apiserver.key'}",
        f"--client-ca-file={keys / 'ca.crt'}",
        f"--service-cluster-ip-range={','.join(SERVICE_RANGES)}",
        f"--service-account-key-file={keys / 'sa.pub'}",
        f"--service-account-signing-key-file={keys / 'sa.key'}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--kubelet-certificate-authority={keys / 'ca.crt'}",
        f"--kubelet-client-certificate={keys / 'kubelet-client.crt'}",
        f"--kubelet-client-key={keys / 'kubelet-client.key'}",
        "--kubelet-preferred-address-types=InternalIP",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged=true",
        "--profiling=false",
        # no proxy of Services is here: aggregated servers and webhooks are reached at their pods' addresses
        "--enable-aggregator-routing=true",
        f"--requestheader-client-ca-file={keys / 'front-proxy-ca.crt'}",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-username-headers=X-Remote-User",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        f"--proxy-client-cert-file={keys / 'front-proxy-client.crt'}",
        f"--proxy-client-key-file={keys / 'front-proxy-client.key'}",
        f"--audit-policy-file={policy}",
        f"--audit-log-path={layout.logs / 'audit.log'}",
        "--audit-log-maxsize=500",
    ]
