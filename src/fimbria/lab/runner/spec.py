"""What a pod asks for and what its status says. Pure: API objects in, values out."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from fimbria.lab import kernel
from fimbria.lab.errors import LabError
from fimbria.sources.k8s.resources import Resource
from fimbria.sources.k8s.types.meta import ApiObject

IMAGE = "fimbria/labtool"  # the one image name with a meaning; for others the command must be given
RUNNER_VERSION = "fimbria-lab"  # as a node's kubeletVersion: tells the lab's nodes from others
SUPPORTED_FIELDS = (
    "metadata.name",
    "metadata.namespace",
    "metadata.uid",
    "spec.nodeName",
    "status.podIP",
    "status.podIPs",
    "status.hostIP",
    "spec.serviceAccountName",
)
_REFERENCE = re.compile(r"\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)|\$\$")


class PodObject(ApiObject, frozen=True):
    """A pod with all its fields, unlike the agent's Pod, which knows only what networking needs."""

    spec: dict[str, Any] = msgspec.field(default_factory=dict)
    status: dict[str, Any] = msgspec.field(default_factory=dict)


PODS: Resource[PodObject] = Resource("", "v1", "pods", "Pod", PodObject)


@dataclass(frozen=True)
class Addresses:
    """What is known only after CNI ADD."""

    pod: tuple[str, ...]
    host: tuple[str, ...]


@dataclass(frozen=True)
class Probe:
    """`kind` is tcp, http or exec. Times in seconds."""

    kind: str
    port: int = 0
    path: str = "/"
    command: tuple[str, ...] = ()
    initial_delay: float = 0
    period: float = 10
    timeout: float = 1
    successes: int = 1
    failures: int = 3


@dataclass(frozen=True)
class ContainerSpec:
    name: str
    image: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, Any], ...]
    cwd: str
    readiness: Probe | None
    init: bool = False
    sidecar: bool = False
    last_words: bool = False  # terminationMessagePolicy FallbackToLogsOnError


@dataclass(frozen=True)
class PodPlan:
    """A pod as the runner sees it; init containers stand first."""

    uid: str
    namespace: str
    name: str
    hostname: str
    node: str
    service_account: str
    host_network: bool
    restart_policy: str
    grace: float
    containers: tuple[ContainerSpec, ...]
    dns: tuple[str, ...] = ()
    searches: tuple[str, ...] = ()
    host_aliases: tuple[tuple[str, tuple[str, ...]], ...] = ()
    capabilities: Mapping[str, Any] = field(default_factory=dict)


def plan(pod: PodObject, labtool: str) -> PodPlan:
    """Raises LabError naming what can't be run here."""
    spec, meta = pod.spec, pod.metadata
    containers = [_container(c, labtool, init=True) for c in spec.get("initContainers") or ()]
    containers += [_container(c, labtool, init=False) for c in spec.get("containers") or ()]
    dns = spec.get("dnsConfig") or {}
    grace = spec.get("terminationGracePeriodSeconds")
    return PodPlan(
        uid=meta.uid,
        namespace=meta.namespace,
        name=meta.name,
        hostname=(spec.get("hostname") or meta.name)[:63],
        node=spec.get("nodeName", ""),
        service_account=spec.get("serviceAccountName") or "default",
        host_network=bool(spec.get("hostNetwork")),
        restart_policy=spec.get("restartPolicy") or "Always",
        grace=float(30 if grace is None else grace),
        containers=tuple(containers),
        dns=tuple(dns.get("nameservers") or ()),
        searches=tuple(dns.get("searches") or ()),
        host_aliases=tuple((a["ip"], tuple(a.get("hostnames") or ())) for a in spec.get("hostAliases") or ()),
        capabilities=_capabilities(spec),
    )


def _capabilities(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Capability arguments of well-known CNI conventions (CONVENTIONS.md, "portMappings")."""
    mappings = [
        {
            "hostPort": p["hostPort"],
            "containerPort": p["containerPort"],
            "protocol": str(p.get("protocol") or "TCP").lower(),
            "hostIP": p.get("hostIP", ""),
        }
        for c in spec.get("containers") or ()
        for p in c.get("ports") or ()
        if p.get("hostPort")
    ]
    return {"portMappings": mappings} if mappings else {}


def _container(c: Mapping[str, Any], labtool: str, *, init: bool) -> ContainerSpec:
    name, image = c.get("name", ""), c.get("image", "")
    is_tool = image.split(":")[0] == IMAGE
    command, args = list(c.get("command") or ()), list(c.get("args") or ())
    if not command and not is_tool:
        raise LabError(f"container {name}: the lab pulls no images; give a command, or use image {IMAGE}")
    argv = (
        command or [labtool, *([] if args else ["serve", "--http", "8080", "--tcp", "9000", "--udp", "9001"])]
    ) + args
    if is_tool and argv[0] in ("labtool", "/labtool"):
        argv[0] = labtool
    for key in ("envFrom", "volumeDevices"):
        if c.get(key):
            raise LabError(f"container {name}: {key} isn't supported by the lab")
    return ContainerSpec(
        name,
        image,
        tuple(argv),
        tuple((e["name"], e) for e in c.get("env") or ()),
        c.get("workingDir") or "/",
        _probe(c),
        init,
        init and c.get("restartPolicy") == "Always",
        c.get("terminationMessagePolicy") == "FallbackToLogsOnError",
    )


def _probe(c: Mapping[str, Any]) -> Probe | None:
    p = c.get("readinessProbe")
    if not p:
        return None
    common: dict[str, Any] = {
        "initial_delay": p.get("initialDelaySeconds") or 0,
        "period": p.get("periodSeconds") or 10,
        "timeout": p.get("timeoutSeconds") or 1,
        "successes": p.get("successThreshold") or 1,
        "failures": p.get("failureThreshold") or 3,
    }
    if p.get("tcpSocket"):
        return Probe("tcp", _port(c, p["tcpSocket"].get("port")), "/", (), **common)
    if p.get("httpGet"):
        return Probe("http", _port(c, p["httpGet"].get("port")), p["httpGet"].get("path") or "/", (), **common)
    if p.get("exec"):
        return Probe("exec", 0, "/", tuple(p["exec"].get("command") or ()), **common)
    raise LabError(f"container {c.get('name')}: the readiness probe is none of tcpSocket, httpGet, exec")


def _port(c: Mapping[str, Any], port: object) -> int:
    if isinstance(port, int):
        return port
    for p in c.get("ports") or ():
        if p.get("name") == port:
            return int(p["containerPort"])
    raise LabError(f"container {c.get('name')}: a probe names port {port!r}, which the container doesn't have")


# --- environment ---------------------------------------------------------------------------------------------------


def environment(pod: PodPlan, container: ContainerSpec, addresses: Addresses) -> dict[str, str]:
    """The container's variables, with fieldRef and $(NAME) resolved. Raises LabError for a source the lab hasn't."""
    env = {
        "PATH": kernel.PATH,
        "HOSTNAME": pod.hostname,
        "HOME": "/root",
    }
    for name, entry in container.env:
        if entry.get("valueFrom"):
            env[name] = _field(pod, container, entry["valueFrom"], addresses)
        else:
            env[name] = expand(str(entry.get("value") or ""), env)
    return env


def _field(pod: PodPlan, container: ContainerSpec, source: Mapping[str, Any], addresses: Addresses) -> str:
    path = (source.get("fieldRef") or {}).get("fieldPath", "")
    values = dict(
        zip(
            SUPPORTED_FIELDS,
            (
                pod.name,
                pod.namespace,
                pod.uid,
                pod.node,
                next(iter(addresses.pod), ""),
                ",".join(addresses.pod),
                next(iter(addresses.host), ""),
                pod.service_account,
            ),
            strict=True,
        )
    )
    if path not in values:
        raise LabError(
            f"container {container.name}: the lab resolves env from fieldRef {', '.join(SUPPORTED_FIELDS)} only"
        )
    return values[path]


def expand(text: str, env: Mapping[str, str]) -> str:
    """$(NAME) as Kubernetes expands it: $$ is a dollar sign, unknown names stay as they are."""
    return _REFERENCE.sub(lambda m: "$" if m.group(0) == "$$" else env.get(m.group(1), m.group(0)), text)


def command(container: ContainerSpec, env: Mapping[str, str]) -> list[str]:
    return [expand(a, env) for a in container.argv]


# --- status --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ContainerState:
    """`state` is waiting, running or terminated; times are RFC 3339 text."""

    state: str = "waiting"
    reason: str = "PodInitializing"
    message: str = ""
    started: str = ""
    finished: str = ""
    exit_code: int = 0
    restarts: int = 0
    ready: bool = False
    last_exit: tuple[int, str, str] | None = None  # exit code, started, finished

    @property
    def done(self) -> bool:
        return self.state == "terminated"


def phase(pod: PodPlan, states: Mapping[str, ContainerState]) -> str:
    """Pending until all init containers are done and one container has started; then Running; at the end Succeeded or
    Failed."""
    init = [states[c.name] for c in pod.containers if c.init and not c.sidecar]
    main = [states[c.name] for c in pod.containers if not c.init]
    if any(s.done and s.exit_code for s in init) and pod.restart_policy == "Never":
        return "Failed"
    if not all(s.done and s.exit_code == 0 for s in init) or all(s.state == "waiting" and not s.restarts for s in main):
        return "Pending"
    if all(s.done for s in main) and pod.restart_policy != "Always":
        if all(s.exit_code == 0 for s in main):
            return "Succeeded"
        return "Failed" if pod.restart_policy == "Never" else "Running"
    return "Running"


def status(
    pod: PodPlan,
    states: Mapping[str, ContainerState],
    addresses: Addresses,
    *,
    started: str,
    now: str,
    before: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """The status object to merge; `before` are the conditions that stand there now, whose times are kept while
    nothing changes."""
    main = [c for c in pod.containers if not c.init or c.sidecar]
    current = phase(pod, states)
    ready = current == "Running" and all(states[c.name].ready for c in main)
    initialized = all(states[c.name].done for c in pod.containers if c.init and not c.sidecar)
    conditions = {
        "PodReadyToStartContainers": bool(addresses.pod),
        "Initialized": initialized,
        "Ready": ready,
        "ContainersReady": ready,
        "PodScheduled": True,
    }
    ours = [_condition(kind, on, now, before) for kind, on in conditions.items()]
    others = [dict(c) for c in before if c.get("type") not in conditions]
    return {
        "phase": current,
        "startTime": started,
        "conditions": ours + others,
        "hostIP": next(iter(addresses.host), None),
        "hostIPs": [{"ip": a} for a in addresses.host],
        "podIP": next(iter(addresses.pod), None),
        "podIPs": [{"ip": a} for a in addresses.pod] or None,
        "containerStatuses": [_container_status(c, states[c.name]) for c in pod.containers if not c.init],
        "initContainerStatuses": [_container_status(c, states[c.name]) for c in pod.containers if c.init] or None,
    }


def _condition(kind: str, on: bool, now: str, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    text = "True" if on else "False"
    for old in before:
        if old.get("type") == kind and old.get("status") == text:
            return dict(old)
    return {"type": kind, "status": text, "lastTransitionTime": now, "lastProbeTime": None}


def _container_status(c: ContainerSpec, s: ContainerState) -> dict[str, Any]:
    detail: dict[str, Any]
    if s.state == "running":
        detail = {"running": {"startedAt": s.started}}
    elif s.done:
        detail = {
            "terminated": {
                "exitCode": s.exit_code,
                "reason": "Completed" if s.exit_code == 0 else "Error",
                "message": s.message or None,
                "startedAt": s.started or None,
                "finishedAt": s.finished or None,
            }
        }
    else:
        detail = {"waiting": {"reason": s.reason, "message": s.message or None}}
    result = {
        "name": c.name,
        "image": c.image,
        "imageID": "",
        "ready": s.ready,
        "started": s.state == "running",
        "restartCount": s.restarts,
        "state": detail,
    }
    if s.last_exit:
        code, started, finished = s.last_exit
        result["lastState"] = {
            "terminated": {
                "exitCode": code,
                "reason": "Completed" if code == 0 else "Error",
                "startedAt": started or None,
                "finishedAt": finished or None,
            }
        }
    return result
