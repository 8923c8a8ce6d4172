"""Requests, results and errors of the CNI specification 1.1.0 (sections 2 and 4), and the results of 0.3.0 to 1.0.0."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final

from fimbria.model.address import is_v4, unpack

SUPPORTED: Final = ("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
COMMANDS: Final = ("ADD", "DEL", "CHECK", "STATUS", "GC")
_SINCE: Final = {"CHECK": "0.4.0", "STATUS": "1.1.0", "GC": "1.1.0"}
_CONTAINER_ID: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")
_MAX_CONTAINER_ID: Final = 256


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
    def prev_result(self) -> Mapping[str, Any] | None:
        """The result of the plugin before us (ADD) or of the whole chain (CHECK, DEL)."""
        result = self.config.get("prevResult")
        return result if isinstance(result, dict) else None

    @property
    def valid_attachments(self) -> frozenset[str] | None:
        """GC: the owners that still exist, or None if the runtime named none."""
        listed = self.config.get("cni.dev/valid-attachments", self.config.get("cni.dev/attachments"))
        if not isinstance(listed, list):
            return None
        rows = [a for a in listed if isinstance(a, dict)]
        return frozenset(f"{a.get('containerID', '')}/{a.get('ifname', '')}" for a in rows)


def peek_version(config: bytes) -> str:
    """The request's version, for an error answer to a request that can't be parsed further."""
    try:
        version = json.loads(config).get("cniVersion", "")
    except (ValueError, AttributeError):
        return SUPPORTED[-1]
    return version if isinstance(version, str) and version else "0.1.0"


def parse(env: Mapping[str, str], stdin: bytes, netns_fd: int) -> Request:
    """Check a request against the specification. Raises CniError."""
    command = env.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_COMMAND {command!r} is not one of {', '.join(COMMANDS)}")
    config = _parse_config(stdin)
    version = _parse_version(config, command)
    attached = command in ("ADD", "DEL", "CHECK")
    container, ifname = env.get("CNI_CONTAINERID", ""), env.get("CNI_IFNAME", "")
    if attached:
        _check_container(container)
        _check_ifname(ifname)
    if command in ("ADD", "CHECK") and not env.get("CNI_NETNS"):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS is not set for {command}")
    if command in ("ADD", "CHECK") and netns_fd < 0:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_NETNS {env['CNI_NETNS']} can't be opened")
    return Request(
        command=command,
        version=version,
        network=config["name"],
        container_id=container,
        ifname=ifname,
        netns=env.get("CNI_NETNS", ""),
        netns_fd=netns_fd,
        args=_parse_args(env.get("CNI_ARGS", "")),
        config=config,
    )


def _parse_config(stdin: bytes) -> dict[str, Any]:
    try:
        config = json.loads(stdin)
    except ValueError as error:
        raise CniError(Code.DECODE_FAILURE, "the network configuration is not JSON", str(error)) from None
    if not isinstance(config, dict):
        raise CniError(Code.DECODE_FAILURE, "the network configuration is not a JSON object")
    if not isinstance(config.get("name"), str) or not config["name"]:
        raise CniError(Code.INVALID_CONFIG, "the network configuration has no name")
    return config


def _parse_version(config: Mapping[str, Any], command: str) -> str:
    version = config.get("cniVersion", "0.1.0")
    if version not in SUPPORTED:
        listed = ", ".join(SUPPORTED)
        raise CniError(Code.INCOMPATIBLE_VERSION, f"cniVersion {version!r} is not supported", f"supported: {listed}")
    since = _SINCE.get(command, SUPPORTED[0])
    if SUPPORTED.index(str(version)) < SUPPORTED.index(since):
        raise CniError(
            Code.INCOMPATIBLE_VERSION, f"{command} needs cniVersion {since}, the configuration says {version}"
        )
    return str(version)


def _check_container(container: str) -> None:
    if not container:
        raise CniError(Code.INVALID_ENVIRONMENT, "CNI_CONTAINERID is not set")
    if len(container) > _MAX_CONTAINER_ID or not _CONTAINER_ID.fullmatch(container):
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_CONTAINERID {container[:64]!r} is not valid")


def _check_ifname(ifname: str) -> None:
    bad = not ifname or len(ifname) > 15 or ifname in (".", "..") or any(c in "/:" or c.isspace() for c in ifname)
    if bad:
        raise CniError(Code.INVALID_ENVIRONMENT, f"CNI_IFNAME {ifname[:64]!r} is not a valid interface name")


def _parse_args(text: str) -> dict[str, str]:
    args: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not equals:
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
class Result:
    """What ADD answers."""

    interfaces: tuple[Interface, ...]
    ips: tuple[Address, ...]
    routes: tuple[tuple[str, bytes], ...]
    dns: Mapping[str, Any] = field(default_factory=dict)


def encode_result(result: Result, version: str) -> bytes:
    """The result in the form of the requested version: `version` in ips up to 0.4.0, `mtu` from 1.1.0 on."""
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
    routes = [{"dst": dst, "gw": unpack(gw)} for dst, gw in result.routes]
    body = {"cniVersion": version, "interfaces": interfaces, "ips": ips, "routes": routes, "dns": dict(result.dns)}
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"


def encode_error(error: CniError, version: str) -> bytes:
    """The error structure of the specification, section 5."""
    body = {"cniVersion": version, "code": int(error.code), "msg": error.msg, "details": error.details}
    return json.dumps(body, separators=(",", ":")).encode() + b"\n"
