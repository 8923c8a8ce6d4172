"""Requests, results and errors of the CNI specification 1.1.0 (sections 2, 3 and 5), and the results of 0.3.0 to 1.0.0.

Decisions where the specification leaves one
1. We are an interface plugin and come first in a chain: ADD with a prevResult is refused (code 7).
2. Unknown keys of a configuration are ignored. What asks for something we don't do is refused (code 2, ADD only):
   a delegated `ipam` plugin, and capability arguments (`runtimeConfig`) other than `portMappings`.
3. CNI_ARGS we don't know are ignored, with or without IgnoreUnknown.
4. `cni.dev/valid-attachments: null` is an empty list: that is how Go encodes one. Without the key GC removes nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from fimbria.model.address import is_v4, pack, unpack
from fimbria.model.endpoint import HostPort
from fimbria.model.protocol import WITH_PORTS

PROTOCOL: Final = 1  # of the shim's requests, see cni/shim/fimbria-cni.c
SUPPORTED: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
COMMANDS: Final = ("ADD", "DEL", "CHECK", "STATUS", "GC")
_ATTACHED: Final = ("ADD", "DEL", "CHECK")
_SINCE: Final = {"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}
_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_MAX_CONTAINER_ID: Final = 256
_MAX_IFNAME: Final = 15  # IFNAMSIZ with its end, include/uapi/linux/if.h
_MAX_MAPPINGS: Final = 1024
_GC_KEYS: Final = ("cni.dev/valid-attachments", "cni.dev/attachments")  # the second: libcni 1.2


class Code(IntEnum):
    """Error codes of the specification; from 100 on they are ours."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2
    UNKNOWN_CONTAINER = 3
    INVALID_ENVIRONMENT = 4
    IO_FAILURE = 5
    DECODE_FAILURE = 6
    INVALID_CONFIG = 7
    TRY_AGAIN_LATER = 11
    NOT_AVAILABLE = 50
    INTERFACE_EXISTS = 100
    CHECK_FAILED = 101
    NO_ADDRESS = 102
    NO_HOST_PORT = 103
    INTERNAL = 999


class CniError(Exception):
    """An error to be answered as the specification's error structure."""

    def __init__(self, code: Code, msg: str, details: str = "") -> None:
        super().__init__(f"{msg}: {details}" if details else msg)
        self.code = code
        self.msg = msg
        self.details = details


@dataclass(frozen=True, slots=True)
class Request:
    """One validated request. `netns_fd` is owned by the server; -1 if the runtime gave none or it is gone."""

    command: str
    version: str
    network: str
    container_id: str
    ifname: str
    netns: str
    netns_fd: int
    args: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def owner(self) -> str:
        """What the specification calls the attachment: container id and interface."""
        return f"{self.container_id}/{self.ifname}"

    @property
    def pod(self) -> tuple[str, str] | None:
        """Namespace and name of the pod, if the runtime is a kubelet's."""
        namespace, name = self.args.get("K8S_POD_NAMESPACE", ""), self.args.get("K8S_POD_NAME", "")
        return (namespace, name) if namespace and name else None

    @property
    def prev_result(self) -> PrevResult | None:
        """The result of the plugin before us (ADD) or of the whole chain (CHECK, DEL). Raises CniError."""
        raw = self.config.get("prevResult")
        return None if raw is None else parse_prev_result(raw)

    @property
    def host_ports(self) -> tuple[HostPort, ...]:
        """The port mappings that the runtime asks for (CNI conventions, "portMappings"). Raises CniError."""
        return parse_port_mappings(_runtime_config(self.config).get("portMappings"))

    @property
    def valid_attachments(self) -> frozenset[str]:
        """GC: the owners that still exist. Raises CniError if the runtime names none or one that can't be read: what
        was misunderstood must not cost a pod its network."""
        key = next((k for k in _GC_KEYS if k in self.config), None)
        if key is None:
            raise CniError(Code.INVALID_CONFIG, f"GC without {_GC_KEYS[0]}", "nothing was removed")
        listed = [] if self.config[key] is None else self.config[key]
        if not isinstance(listed, list):
            raise CniError(Code.INVALID_CONFIG, f"{key} is not a list", "nothing was removed")
        return frozenset(_attachment(key, row) for row in listed)


def _attachment(key: str, row: Any) -> str:
    container, ifname = (row.get("containerID"), row.get("ifname")) if isinstance(row, dict) else ("", "")
    if not isinstance(container, str) or not isinstance(ifname, str) or not container or not ifname:
        raise CniError(Code.INVALID_CONFIG, f"{key} has an entry that is no attachment: {_short(row)}")
    return f"{container}/{ifname}"


def _short(value: Any) -> str:
    return json.dumps(value, default=str)[:200]


@dataclass(frozen=True, slots=True)
class PrevResult:
    """What matters to us in a result: for an interface name inside the pod its MAC as written (or ""), the addresses
    (without length), and the destinations of the routes."""

    macs: Mapping[str, str]
    addresses: frozenset[str]
    routes: frozenset[str]


def parse_prev_result(raw: Any) -> PrevResult:
    """A prevResult of any supported version. Raises CniError."""
    if not isinstance(raw, dict):
        raise CniError(Code.INVALID_CONFIG, "prevResult is not an object")
    interfaces = _objects(raw, "interfaces")
    addresses = [_text(ip, "address", "ips").split("/")[0] for ip in _objects(raw, "ips")]
    return PrevResult(
        {_text(i, "name", "interfaces"): str(i.get("mac") or "") for i in interfaces if i.get("sandbox")},
        frozenset(addresses),
        frozenset(_text(r, "dst", "routes") for r in _objects(raw, "routes")),
    )


def parse_port_mappings(raw: Any) -> tuple[HostPort, ...]:
    """`runtimeConfig.portMappings`: a list of {hostPort, containerPort, protocol, hostIP}; the same twice is once.

    A missing protocol is TCP. Keys may be written in any case: containerd writes them as HostPort, which plugins in Go
    never notice. Raises CniError for a mapping that can't be read: better no pod than one that can't be reached.
    """
    rows = [] if raw is None else raw
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise CniError(Code.INVALID_CONFIG, "runtimeConfig.portMappings is not a list of objects")
    if len(rows) > _MAX_MAPPINGS:
        raise CniError(Code.INVALID_CONFIG, f"runtimeConfig.portMappings has more than {_MAX_MAPPINGS} entries")
    return tuple(dict.fromkeys(_port_mapping(row) for row in rows))


def _port_mapping(row: Mapping[str, Any]) -> HostPort:
    folded = {key.lower(): value for key, value in row.items()}
    ports = [folded.get(key) for key in ("hostport", "containerport")]
    if not all(isinstance(p, int) and not isinstance(p, bool) and 0 < p < 65536 for p in ports):
        raise CniError(Code.INVALID_CONFIG, f"portMappings: hostPort and containerPort must be ports: {_short(row)}")
    name = folded.get("protocol") or "tcp"
    proto = WITH_PORTS.get(name.upper()) if isinstance(name, str) else None
    if proto is None:
        raise CniError(Code.INVALID_CONFIG, f"portMappings: protocol must be tcp, udp or sctp: {_short(row)}")
    text = folded.get("hostip") or ""
    try:
        host_ip = pack(text) if text else b""
    except (ValueError, TypeError, UnicodeError):
        raise CniError(Code.INVALID_CONFIG, f"portMappings: hostIP is not an IP address: {_short(row)}") from None
    return HostPort(int(ports[0] or 0), int(ports[1] or 0), proto, host_ip)


def _objects(raw: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    rows = [] if raw.get(key) is None else raw[key]
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise CniError(Code.INVALID_CONFIG, f"prevResult.{key} is not a list of objects")
    return rows


def _text(row: Mapping[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        raise CniError(Code.INVALID_CONFIG, f"prevResult.{where} has an entry without {key}: {_short(row)}")
    return value


def peek_version(config: bytes) -> str:
    """The request's version, for an error answer to a request that can't be parsed further."""
    try:
        version = json.loads(config).get("cniVersion", "")
    except (ValueError, AttributeError, RecursionError):
        return SUPPORTED[-1]
    return version if isinstance(version, str) and version else "0.1.0"


def parse(env: Mapping[str, str], stdin: bytes, netns_fd: int) -> Request:
    """Check a request against the specification. Raises CniError."""
    _check_protocol(env.get("FIMBRIA_PROTOCOL", "1"))
    command = env.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_COMMAND {command[:32]!r} is not one of {', '.join(COMMANDS)}")
    config = _parse_config(stdin)
    version = _parse_version(config, command)
    container, ifname = env.get("CNI_CONTAINERID", ""), env.get("CNI_IFNAME", "")
    if command in _ATTACHED:
        _check_container(container)
        _check_ifname(ifname)
    if command in ("ADD", "CHECK"):
        _check_netns(env.get("CNI_NETNS", ""), command, netns_fd)
    if command == "ADD":
        _check_add(config)
    return Request(
        command=command,
        version=version,
        network=config["name"],
        container_id=container,
        ifname=ifname,
        netns=env.get("CNI_NETNS", ""),
        netns_fd=netns_fd,
        args=_parse_args(env.get("CNI_ARGS", "")) if command in _ATTACHED else {},
        config=config,
    )


def _check_protocol(spoken: str) -> None:
    """A shim that doesn't say speaks the first one. A newer one's request might not mean what it seems to."""
    if not spoken.isdecimal() or int(spoken) > PROTOCOL:
        raise CniError(
            Code.TRY_AGAIN_LATER,
            f"fimbria-cni speaks protocol {spoken[:16]}, this agent up to {PROTOCOL}",
            "they are of different releases; the agent installs its own plugin when it is ready",
        )


def _parse_config(stdin: bytes) -> dict[str, Any]:
    if not stdin.strip():
        raise CniError(Code.DECODE_FAILURE, "the network configuration is empty", "it is expected on stdin")
    try:
        config = json.loads(stdin)
    except (ValueError, RecursionError) as error:
        raise CniError(Code.DECODE_FAILURE, "the network configuration is not JSON", str(error)) from None
    if not isinstance(config, dict):
        raise CniError(Code.DECODE_FAILURE, "the network configuration is not a JSON object")
    name = config.get("name")
    if not isinstance(name, str) or not name:
        raise CniError(Code.INVALID_CONFIG, "the network configuration has no name")
    if not _NAME.fullmatch(name):
        raise CniError(Code.INVALID_CONFIG, f"the network's name {name[:64]!r} is not valid")
    return config


def _parse_version(config: Mapping[str, Any], command: str) -> str:
    version = config.get("cniVersion", "0.1.0")
    if version not in SUPPORTED:
        listed = ", ".join(SUPPORTED)
        raise CniError(
            Code.INCOMPATIBLE_VERSION, f"cniVersion {_short(version)} is not supported", f"supported: {listed}"
        )
    since = _SINCE.get(command, SUPPORTED[0])
    if SUPPORTED.index(str(version)) < SUPPORTED.index(since):
        raise CniError(
            Code.INCOMPATIBLE_VERSION, f"{command} needs cniVersion {since}, the configuration says {version}"
        )
    return str(version)


def _check_container(container: str) -> None:
    if not container:
        raise CniError(Code.INVALID_ENVIRONMENT, "CNI_CONTAINERID is not set")
    if len(container) > _MAX_CONTAINER_ID or not _NAME.fullmatch(container):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_CONTAINERID {container[:64]!r} is not valid")


def _check_ifname(ifname: str) -> None:
    """The kernel's rule (dev_valid_name), and no %: the kernel would number such a name itself."""
    size = len(ifname.encode("utf-8", "surrogatepass"))
    if not 0 < size <= _MAX_IFNAME or ifname in (".", "..") or any(c in "/:%\ufffd" or c.isspace() for c in ifname):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_IFNAME {ifname[:64]!r} is not a valid interface name")


def _check_netns(netns: str, command: str, netns_fd: int) -> None:
    if not netns:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS is not set for {command}")
    if netns_fd < 0:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS {netns[:256]} can't be opened")


def _check_add(config: Mapping[str, Any]) -> None:
    """What a user would expect to happen, and wouldn't."""
    if config.get("prevResult") is not None:
        raise CniError(
            Code.INVALID_CONFIG,
            "fimbria-cni must be the first plugin of a chain",
            "ADD came with a prevResult; put other plugins after it",
        )
    if config.get("ipam"):
        raise CniError(
            Code.UNSUPPORTED_FIELD,
            f"unsupported field ipam: {_short(config['ipam'])}",
            "addresses come from the node's CiliumNode",
        )
    runtime = _runtime_config(config)
    parse_port_mappings(runtime.get("portMappings"))
    for key, value in runtime.items():
        if value and key != "portMappings":
            raise CniError(
                Code.UNSUPPORTED_FIELD,
                f"unsupported field runtimeConfig.{key}: {_short(value)}",
                "remove it from the plugin's capabilities",
            )
    if not isinstance(config.get("dns") or {}, dict):
        raise CniError(Code.INVALID_CONFIG, f"dns is not an object: {_short(config['dns'])}")


def _runtime_config(config: Mapping[str, Any]) -> dict[str, Any]:
    runtime = config.get("runtimeConfig") or {}
    if not isinstance(runtime, dict):
        raise CniError(Code.INVALID_CONFIG, "runtimeConfig is not an object")
    return runtime


def _parse_args(text: str) -> dict[str, str]:
    args: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_ARGS has {pair[:64]!r}, which is no KEY=VALUE")
        args[key] = value
    return args


@dataclass(frozen=True, slots=True)
class Interface:
    """An interface of a result; an empty sandbox is the host. MTU in bytes."""

    name: str
    mac: str
    sandbox: str = ""
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Address:
    """A pod address (16 bytes), its prefix length as written with the family, and its gateway."""

    addr: bytes
    length: int
    gateway: bytes
    interface: int


@dataclass(frozen=True, slots=True)
class ResultRoute:
    """A route inside the pod: destination in CIDR notation, gateway (16 bytes), MTU in bytes (0: the device's)."""

    dst: str
    gateway: bytes
    mtu: int = 0


@dataclass(frozen=True, slots=True)
class Result:
    """What ADD answers."""

    interfaces: tuple[Interface, ...]
    ips: tuple[Address, ...]
    routes: tuple[ResultRoute, ...]
    dns: Mapping[str, Any] = field(default_factory=dict)


def encode_result(result: Result, version: str) -> bytes:
    """The result in the form of the requested version: `version` in ips up to 0.4.0, every `mtu` from 1.1.0 on."""
    interfaces: list[dict[str, Any]] = []
    for i in result.interfaces:
        row: dict[str, Any] = {"name": i.name, "mac": i.mac}
        if i.sandbox:
            row["sandbox"] = i.sandbox
        if i.mtu and version == "1.1.0":
            row["mtu"] = i.mtu
        interfaces.append(row)
    ips: list[dict[str, Any]] = []
    for a in result.ips:
        ip: dict[str, Any] = {
            "address": f"{unpack(a.addr)}/{a.length}", "gateway": unpack(a.gateway), "interface": a.interface,
        }  # fmt: skip
        if version.startswith("0."):
            ip["version"] = "4" if is_v4(a.addr) else "6"
        ips.append(ip)
    routes: list[dict[str, Any]] = []
    for r in result.routes:
        route: dict[str, Any] = {"dst": r.dst, "gw": unpack(r.gateway)}
        if r.mtu and version == "1.1.0":
            route["mtu"] = r.mtu
        routes.append(route)
    body = {"cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": dict(result.dns)}
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def encode_error(error: CniError, version: str) -> bytes:
    """The error structure of the specification, section 5."""
    body = {"cniVersion": version, "code": int(error.code), "msg": error.msg, "details": error.details}
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"
