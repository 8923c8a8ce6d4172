"""What ``kubectl get`` prints: the columns of Table answers (meta/v1) of each kind."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from fimbria.lab.apiserver.model import Column, Obj, encode

Cell = Callable[[Obj], Any]


def timestamp(now: datetime) -> str:
    return now.strftime("%Y-%m-%dT%H:%M:%SZ")


def parse_time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        return None


def age(text: str | None, now: datetime | None = None) -> str:
    """A short duration as kubectl prints it: ``90s``, ``5m30s``, ``3h``, ``2d4h``."""
    then = parse_time(text) if text else None
    if then is None:
        return "<unknown>"
    seconds = int(((now or datetime.now(UTC)) - then).total_seconds())
    if seconds < -1:
        return "<invalid>"
    seconds = max(seconds, 0)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if minutes < 2:
        return f"{seconds}s"
    if minutes < 10:
        return _two(minutes, "m", seconds % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return _two(days, "d", hours % 24, "h")
    if days < 730:
        return f"{days}d"
    return _two(days // 365, "y", days % 365, "d")


def _two(first: int, unit: str, second: int, smaller: str) -> str:
    return f"{first}{unit}{second}{smaller}" if second else f"{first}{unit}"


def get(obj: Any, *path: str, default: Any = None) -> Any:
    for key in path:
        obj = obj.get(key) if isinstance(obj, dict) else None
    return default if obj is None else obj


def _age_of(obj: Obj) -> str:
    return age(get(obj, "metadata", "creationTimestamp"))


NAME = Column("Name", "string", lambda obj: obj["metadata"]["name"], format="name")
AGE = Column("Age", "string", _age_of)
DEFAULT = (NAME, Column("Created At", "date", lambda obj: get(obj, "metadata", "creationTimestamp")))


def _text(*path: str, default: str = "<none>") -> Cell:
    return lambda obj: str(get(obj, *path, default=default) or default)


def _count(*path: str) -> Cell:
    return lambda obj: len(get(obj, *path, default=()))


def _number(*path: str) -> Cell:
    return lambda obj: int(get(obj, *path, default=0))


def labels_text(labels: dict[str, str] | None) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted((labels or {}).items())) or "<none>"


def selector_text(selector: Obj | None) -> str:
    """A LabelSelector in the notation of ``-l``; ``<none>`` for one that selects all."""
    parts = [f"{key}={value}" for key, value in sorted((get(selector, "matchLabels") or {}).items())]
    for term in get(selector, "matchExpressions") or []:
        key, values = term["key"], ",".join(sorted(term.get("values") or []))
        shapes = {"In": f"{key} in ({values})", "NotIn": f"{key} notin ({values})", "Exists": key}
        parts.append(shapes.get(term["operator"], f"!{key}"))
    return ",".join(parts) or "<none>"


# ---- pods


def _containers(obj: Obj) -> list[Obj]:
    statuses: list[Obj] = get(obj, "status", "containerStatuses", default=[])
    return statuses


def _pod_ready(obj: Obj) -> str:
    total = len(get(obj, "spec", "containers", default=()))
    return f"{sum(bool(one.get('ready')) for one in _containers(obj))}/{total}"


def pod_status(obj: Obj) -> str:
    """The STATUS column: the phase, or what keeps a container from running."""
    status = obj.get("status") or {}
    text = status.get("reason") or status.get("phase") or "Unknown"
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("reason") == "SchedulingGated":
            text = "SchedulingGated"
    running = False
    for one in reversed(_containers(obj)):
        waiting, ended = get(one, "state", "waiting"), get(one, "state", "terminated")
        if waiting and waiting.get("reason"):
            text = waiting["reason"]
        elif ended:
            text = ended.get("reason") or (f"Signal:{ended['signal']}" if ended.get("signal") else "") or (
                f"ExitCode:{ended.get('exitCode', 0)}")  # fmt: skip
        elif one.get("ready") and get(one, "state", "running"):
            running = True
    if text == "Completed" and running:
        text = "Running"
    if obj["metadata"].get("deletionTimestamp"):
        return "Unknown" if status.get("reason") == "NodeLost" else "Terminating"
    return str(text)


def _restarts(obj: Obj) -> str:
    return str(sum(int(one.get("restartCount", 0)) for one in _containers(obj)))


def _gates(obj: Obj) -> str:
    gates = get(obj, "spec", "readinessGates", default=[])
    conditions = get(obj, "status", "conditions", default=[])
    true = {one["type"] for one in conditions if one.get("status") == "True"}
    return f"{sum(gate['conditionType'] in true for gate in gates)}/{len(gates)}" if gates else "<none>"


PODS = (
    NAME,
    Column("Ready", "string", _pod_ready),
    Column("Status", "string", pod_status),
    Column("Restarts", "string", _restarts),
    AGE,
    Column("IP", "string", _text("status", "podIP"), 1),
    Column("Node", "string", _text("spec", "nodeName"), 1),
    Column("Nominated Node", "string", _text("status", "nominatedNodeName"), 1),
    Column("Readiness Gates", "string", _gates, 1),
)

# ---- nodes


def _node_status(obj: Obj) -> str:
    ready = [one for one in get(obj, "status", "conditions", default=[]) if one["type"] == "Ready"]
    text = "Unknown" if not ready else "Ready" if ready[0].get("status") == "True" else "NotReady"
    return text + (",SchedulingDisabled" if get(obj, "spec", "unschedulable") else "")


def _roles(obj: Obj) -> str:
    prefix = "node-role.kubernetes.io/"
    labels = obj["metadata"].get("labels") or {}
    return ",".join(sorted(key.removeprefix(prefix) for key in labels if key.startswith(prefix))) or "<none>"


def _address(kind: str) -> Cell:
    def find(obj: Obj) -> str:
        addresses = get(obj, "status", "addresses", default=[])
        return next((one["address"] for one in addresses if one["type"] == kind), "<none>")

    return find


NODES = (
    NAME,
    Column("Status", "string", _node_status),
    Column("Roles", "string", _roles),
    AGE,
    Column("Version", "string", _text("status", "nodeInfo", "kubeletVersion", default="")),
    Column("Internal-IP", "string", _address("InternalIP"), 1),
    Column("External-IP", "string", _address("ExternalIP"), 1),
    Column("OS-Image", "string", _text("status", "nodeInfo", "osImage", default="<unknown>"), 1),
    Column("Kernel-Version", "string", _text("status", "nodeInfo", "kernelVersion", default="<unknown>"), 1),
    Column("Container-Runtime", "string",
           _text("status", "nodeInfo", "containerRuntimeVersion", default="<unknown>"), 1),
)  # fmt: skip

# ---- services and endpoints


def _external_ip(obj: Obj) -> str:
    spec = obj["spec"]
    if spec.get("type") == "ExternalName":
        return str(spec.get("externalName", "<none>"))
    found = [one.get("ip") or one.get("hostname") for one in get(obj, "status", "loadBalancer", "ingress", default=[])]
    found += spec.get("externalIPs") or []
    return ",".join(found) or ("<pending>" if spec.get("type") == "LoadBalancer" else "<none>")


def _service_ports(obj: Obj) -> str:
    texts = [
        f"{port['port']}{':' + str(port['nodePort']) if port.get('nodePort') else ''}/{port.get('protocol', 'TCP')}"
        for port in obj["spec"].get("ports") or []
    ]
    return ",".join(texts) or "<none>"


SERVICES = (
    NAME,
    Column("Type", "string", _text("spec", "type")),
    Column("Cluster-IP", "string", _text("spec", "clusterIP")),
    Column("External-IP", "string", _external_ip),
    Column("Port(s)", "string", _service_ports),
    AGE,
    Column("Selector", "string", lambda obj: labels_text(obj["spec"].get("selector")), 1),
)


def _few(values: list[str], shown: int = 3) -> str:
    if not values:
        return "<none>"
    return ",".join(values[:shown]) + (f" + {len(values) - shown} more..." if len(values) > shown else "")


def _endpoints(obj: Obj) -> str:
    found: list[str] = []
    for subset in obj.get("subsets") or []:
        for address in subset.get("addresses") or []:
            ip = f"[{address['ip']}]" if ":" in address["ip"] else address["ip"]
            found += [f"{ip}:{port['port']}" for port in subset.get("ports") or []] or [ip]
    return _few(found)


def _slice_ports(obj: Obj) -> str:
    return _few([str(port.get("port", "*")) for port in obj.get("ports") or []]) if obj.get("ports") else "<unset>"


def _slice_endpoints(obj: Obj) -> str:
    if not obj.get("endpoints"):
        return "<unset>"
    return _few([address for one in obj["endpoints"] for address in one.get("addresses") or []])


ENDPOINTS = (NAME, Column("Endpoints", "string", _endpoints), AGE)
ENDPOINT_SLICES = (
    NAME,
    Column("AddressType", "string", _text("addressType")),
    Column("Ports", "string", _slice_ports),
    Column("Endpoints", "string", _slice_endpoints),
    AGE,
)

# ---- workloads


def _names(obj: Obj) -> str:
    return ",".join(one["name"] for one in get(obj, "spec", "template", "spec", "containers", default=[]))


def _images(obj: Obj) -> str:
    return ",".join(one.get("image", "") for one in get(obj, "spec", "template", "spec", "containers", default=[]))


def _selector(obj: Obj) -> str:
    return selector_text(get(obj, "spec", "selector"))


_WIDE = (
    Column("Containers", "string", _names, 1),
    Column("Images", "string", _images, 1),
    Column("Selector", "string", _selector, 1),
)
DEPLOYMENTS = (
    NAME,
    Column(
        "Ready", "string", lambda obj: f"{get(obj, 'status', 'readyReplicas', default=0)}/{obj['spec']['replicas']}"
    ),
    Column("Up-to-date", "string", lambda obj: str(get(obj, "status", "updatedReplicas", default=0))),
    Column("Available", "string", lambda obj: str(get(obj, "status", "availableReplicas", default=0))),
    AGE,
    *_WIDE,
)
REPLICA_SETS = (
    NAME,
    Column("Desired", "integer", _number("spec", "replicas")),
    Column("Current", "integer", _number("status", "replicas")),
    Column("Ready", "integer", _number("status", "readyReplicas")),
    AGE,
    *_WIDE,
)
DAEMON_SETS = (
    NAME,
    Column("Desired", "integer", _number("status", "desiredNumberScheduled")),
    Column("Current", "integer", _number("status", "currentNumberScheduled")),
    Column("Ready", "integer", _number("status", "numberReady")),
    Column("Up-to-date", "integer", _number("status", "updatedNumberScheduled")),
    Column("Available", "integer", _number("status", "numberAvailable")),
    Column("Node Selector", "string",
           lambda obj: labels_text(get(obj, "spec", "template", "spec", "nodeSelector"))),
    AGE,
    *_WIDE,
)  # fmt: skip

# ---- the rest


def _seen(obj: Obj) -> str:
    return age(obj.get("lastTimestamp") or obj.get("eventTime") or obj["metadata"].get("creationTimestamp"))


def _about(obj: Obj) -> str:
    about = obj.get("involvedObject") or {}
    return f"{about.get('kind', '').lower()}/{about.get('name', '')}"


EVENTS = (
    Column("Last Seen", "string", _seen),
    Column("Type", "string", _text("type", default="")),
    Column("Reason", "string", _text("reason", default="")),
    Column("Object", "string", _about),
    Column("Message", "string", lambda obj: str(obj.get("message", "")).strip()),
    Column("Name", "string", lambda obj: obj["metadata"]["name"], 1, "name"),
)
NAMESPACES = (NAME, Column("Status", "string", _text("status", "phase")), AGE)
CONFIG_MAPS = (
    NAME,
    Column("Data", "string", lambda obj: str(len(obj.get("data") or {}) + len(obj.get("binaryData") or {}))),
    AGE,
)
SECRETS = (
    NAME,
    Column("Type", "string", _text("type")),
    Column("Data", "string", lambda obj: str(len(obj.get("data") or {}))),
    AGE,
)
SERVICE_ACCOUNTS = (NAME, AGE)
NETWORK_POLICIES = (
    NAME,
    Column("Pod-Selector", "string", lambda obj: selector_text(get(obj, "spec", "podSelector"))),
    AGE,
)
LEASES = (NAME, Column("Holder", "string", _text("spec", "holderIdentity", default="")), AGE)
CREATED = (NAME, Column("Created At", "date", lambda obj: get(obj, "metadata", "creationTimestamp")))
BINDINGS = (
    NAME,
    Column(
        "Role",
        "string",
        lambda obj: f"{get(obj, 'roleRef', 'kind', default='')}/{get(obj, 'roleRef', 'name', default='')}",
    ),
    AGE,
)

# ---- custom resources


_STEP = re.compile(r"""\.([\w\0/-]+)|\['([^']+)'\]|\[(\d+|\*)\]|\[\?\(\s*@\.([\w.-]+)\s*==\s*["']([^"']*)["']\s*\)\]""")
_EACH = -1
_Step = str | int | tuple[str, str]


def json_path(path: str) -> Callable[[Obj], Any]:
    """The small JSONPath of printer columns: ``.a``, ``['x/y']``, ``[0]``, ``[*]``, ``[?(@.a=="b")]``.

    What may match several values gives a list, or None if there are none. Raises ValueError for anything else.
    """
    steps: list[_Step] = []
    at, text = 0, path.replace("\\.", "\0")
    while at < len(text):
        found = _STEP.match(text, at)
        if not found:
            raise ValueError(f"unsupported JSONPath {path!r}")
        if key := found[1] or found[2]:
            steps.append(key.replace("\0", "."))
        elif found[4]:
            steps.append((found[4], found[5]))
        else:
            steps.append(_EACH if found[3] == "*" else int(found[3]))
        at = found.end()
    return lambda obj: _follow(obj, steps)


def _follow(value: Any, steps: list[_Step]) -> Any:
    for number, step in enumerate(steps):
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None
        elif not isinstance(value, list):
            return None
        elif isinstance(step, int) and step != _EACH:
            value = value[step] if step < len(value) else None
        else:
            wanted = step if isinstance(step, tuple) else None
            chosen = [one for one in value if wanted is None or get(one, *wanted[0].split(".")) == wanted[1]]
            found = [_follow(one, steps[number + 1 :]) for one in chosen]
            return [one for one in found if one is not None] or None
    return value


def custom(definitions: list[Obj]) -> tuple[Column, ...]:
    """The columns of a custom resource from its additionalPrinterColumns; the age if there are none."""
    if not definitions:
        return (NAME, AGE)
    columns = [NAME]
    for one in definitions:
        path = one["jsonPath"]
        cell = _custom_cell(json_path(path), one["type"], "[*]" in path or "[?" in path)
        columns.append(Column(one["name"], one["type"], cell, one.get("priority", 0), one.get("format", ""),
                              one.get("description", "")))  # fmt: skip
    return tuple(columns)


def _custom_cell(find: Callable[[Obj], Any], kind: str, several: bool) -> Cell:
    """A cell of this type; of a path that may match several values the first one counts."""

    def cell(obj: Obj) -> Any:
        value = find(obj)
        if several and isinstance(value, list):
            value = value[0]
        if value is None:
            return None
        if kind == "date":
            return age(str(value))
        if kind == "string":
            return value if isinstance(value, str) else _json_text(value)
        return value

    return cell


def _json_text(value: Any) -> str:
    return encode(value).decode()
