"""What a node's containerd and kubelet are told. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.cluster.bed.layout import DNS_ADDRESS, PAUSE_IMAGE, STARTUP_TAINT

SOCKET = "/run/containerd/containerd.sock"
KUBERNETES = "/etc/kubernetes"
MAX_PODS = 250
_UNUSED = (
    "snapshotter.v1.devmapper",
    "snapshotter.v1.btrfs",
    "snapshotter.v1.zfs",
    "snapshotter.v1.aufs",
    "tracing.processor.v1.otlp",
)


def containerd() -> str:
    """config.toml, version 2 (containerd 1.6)."""
    unused = ", ".join(f'"io.containerd.{name}"' for name in _UNUSED)
    return f"""version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = [{unused}]
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # the machine may lack CAP_SYS_RESOURCE: nobody can be protected better than containerd itself
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/opt/cni/bin"
    conf_dir = "/etc/cni/net.d"
"""


def kubelet(cgroup: str, taints: Sequence[str] = (STARTUP_TAINT,)) -> dict[str, Any]:
    """A KubeletConfiguration (kubelet.config.k8s.io/v1beta1). `taints` are keys; their effect is NoSchedule."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{cgroup}",
        "containerRuntimeEndpoint": f"unix://{SOCKET}",
        "staticPodPath": f"{KUBERNETES}/manifests",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{KUBERNETES}/pki/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{KUBERNETES}/pki/kubelet.crt",
        "tlsPrivateKeyFile": f"{KUBERNETES}/pki/kubelet.key",
        "serverTLSBootstrap": False,
        "rotateCertificates": False,
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": "/etc/resolv.conf",
        "maxPods": MAX_PODS,
        "registerWithTaints": [{"key": key, "effect": "NoSchedule"} for key in taints],
        "serializeImagePulls": False,
        "nodeStatusUpdateFrequency": "4s",
        "failSwapOn": False,
        # the machine's own disk and memory aren't the node's to judge
        "evictionHard": {
            "memory.available": "50Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
        "imageGCHighThresholdPercent": 100,
        "imageGCLowThresholdPercent": 99,
    }
