"""Runs CNI plugins as a container runtime does: specification 1.1.0, and the cache format of libcni, whose tools can
then read it.

Network configuration: the first *.conflist, *.conf or *.json of a directory in lexical order (libcni's rule). ADD
runs the plugins in order, each with its predecessor's result; DEL runs them in reverse with the cached result of ADD
and goes on working when the configuration has changed since, because it is cached too.
"""

import asyncio
import base64
import json
import os
import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

KNOWN_VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
MAX_OUTPUT = 1 << 20
_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]*")


class CniError(Exception):
    """A plugin's error result (`code` as in the specification, section "Error"), or 0 for what the runtime itself
    found wrong."""

    def __init__(self, text: str, code: int = 0) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class NetworkList:
    """A network configuration list (specification, section 1)."""

    name: str
    cni_version: str
    plugins: tuple[dict[str, Any], ...]
    raw: bytes
    disable_check: bool = False
    disable_gc: bool = False


@dataclass(frozen=True)
class Attachment:
    """One interface of one container: the parameters of ADD (specification, section 2)."""

    container_id: str
    netns: str
    ifname: str = "eth0"
    args: tuple[tuple[str, str], ...] = ()
    capabilities: Mapping[str, Any] = field(default_factory=dict)


def parse_list(raw: bytes, where: str) -> NetworkList:
    """Raises CniError naming the file and what is wrong with it. A single plugin's configuration becomes a list of
    one."""
    try:
        conf = json.loads(raw)
    except ValueError as e:
        raise CniError(f"{where}: not JSON: {e}") from None
    if not isinstance(conf, dict):
        raise CniError(f"{where}: an object was expected")
    plugins = conf.get("plugins", [conf] if "type" in conf else None)
    name, version = conf.get("name"), conf.get("cniVersion", "0.2.0")
    version = _newest(conf.get("cniVersions"), version)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CniError(f"{where}: name is missing or invalid")
    if version not in KNOWN_VERSIONS:
        raise CniError(f"{where}: cniVersion {version!r} is not supported")
    if not isinstance(plugins, list) or not plugins:
        raise CniError(f"{where}: no plugins")
    for plugin in plugins:
        if (
            not isinstance(plugin, dict)
            or not isinstance(plugin.get("type"), str)
            or not _NAME.fullmatch(plugin["type"])
        ):
            raise CniError(f"{where}: a plugin without a valid type")
    return NetworkList(
        name, version, tuple(plugins), raw, conf.get("disableCheck") is True, conf.get("disableGC") is True
    )


def _newest(versions: object, otherwise: Any) -> Any:
    """`cniVersions` (1.1.0) lists what the configuration may be run with: the newest that we know."""
    if isinstance(versions, list):
        known = [v for v in versions if v in KNOWN_VERSIONS]
        if known:
            return max(known, key=KNOWN_VERSIONS.index)
    return otherwise


def load_list(directory: Path) -> NetworkList:
    """Raises CniError if the directory has no configuration or the first one is broken."""
    candidates = (
        sorted(p for p in directory.glob("*") if p.suffix in (".conflist", ".conf", ".json"))
        if directory.is_dir()
        else []
    )
    if not candidates:
        raise CniError(f"no network configuration in {directory}")
    try:
        raw = candidates[0].read_bytes()
    except OSError as e:
        raise CniError(f"{candidates[0]}: {e.strerror}") from None
    return parse_list(raw, str(candidates[0]))


def plugin_config(
    network: NetworkList,
    plugin: Mapping[str, Any],
    attachment: Attachment | None,
    prev_result: Mapping[str, Any] | None,
) -> bytes:
    """The execution configuration on a plugin's standard input (specification, section 3, "Deriving")."""
    conf = {k: v for k, v in plugin.items() if k not in ("capabilities", "runtimeConfig")}
    conf |= {"name": network.name, "cniVersion": network.cni_version}
    wanted = plugin.get("capabilities") or {}
    runtime = {k: v for k, v in (attachment.capabilities.items() if attachment else ()) if wanted.get(k)}
    if runtime:
        conf["runtimeConfig"] = runtime
    if prev_result is not None:
        conf["prevResult"] = prev_result
    return json.dumps(conf).encode()


def environment(command: str, path: Sequence[Path], attachment: Attachment | None) -> dict[str, str]:
    """CNI_* variables, and the PATH that plugins need to call other programs."""
    env = {
        "CNI_COMMAND": command,
        "CNI_PATH": os.pathsep.join(map(str, path)),
        "PATH": os.environ.get("PATH", os.defpath),
    }
    if attachment is None:
        return env
    return env | {
        "CNI_CONTAINERID": attachment.container_id,
        "CNI_NETNS": attachment.netns,
        "CNI_IFNAME": attachment.ifname,
        "CNI_ARGS": ";".join(f"{k}={v}" for k, v in attachment.args),
    }


def version_at_least(version: str, least: str) -> bool:
    return KNOWN_VERSIONS.index(version) >= KNOWN_VERSIONS.index(least)


def result_addresses(result: Mapping[str, Any], ifname: str = "eth0") -> list[str]:
    """The container's addresses without prefix length, in the plugin's order. Raises CniError for a result that can't
    be used."""
    ips = result.get("ips") or []
    interfaces = result.get("interfaces") or []
    if not isinstance(ips, list) or not isinstance(interfaces, list):
        raise CniError("the plugin's result has no list of ips and interfaces")
    found = []
    for entry in ips:
        if not isinstance(entry, dict) or not isinstance(entry.get("address"), str):
            raise CniError(f"the plugin's result has an unusable address: {entry!r}")
        index = entry.get("interface")
        if index is not None:
            if not isinstance(index, int) or not 0 <= index < len(interfaces):
                raise CniError(f"the plugin's result says interface {index!r} of {len(interfaces)}")
            if not interfaces[index].get("sandbox"):
                continue  # the host's own side
        found.append(entry["address"].split("/")[0])
    if not found:
        raise CniError(f"the plugin's result gives {ifname} no address")
    return found


class Runtime:
    """Executes plugins. `path` is searched in order; results are cached as files below `cache`; `timeout` in seconds
    for one plugin."""

    def __init__(self, path: Sequence[Path], cache: Path, timeout: float = 60.0) -> None:
        self._path = path
        self._cache = cache / "results"
        self._timeout = timeout

    async def add(self, network: NetworkList, attachment: Attachment) -> dict[str, Any]:
        """The last plugin's result, cached. Raises CniError; what the plugins did until then needs a `delete`."""
        result: dict[str, Any] | None = None
        for plugin in network.plugins:
            result = await self._execute("ADD", network, plugin, attachment, result)
            if not isinstance(result, dict):
                raise CniError(f"plugin {plugin['type']} gave no result on ADD")
            if "ips" not in result and "interfaces" not in result and "cniVersion" not in result:
                raise CniError(f"plugin {plugin['type']} gave a result without cniVersion, interfaces and ips")
        assert result is not None
        self._store(network, attachment, result)
        return result

    async def check(self, network: NetworkList, attachment: Attachment) -> None:
        """Raises CniError if a plugin says that something is not as ADD left it. Before 0.4.0 there is no CHECK."""
        if network.disable_check or not version_at_least(network.cni_version, "0.4.0"):
            return
        cached = self._load(attachment)
        if cached is None:
            raise CniError(f"no cached result for container {attachment.container_id}")
        for plugin in network.plugins:
            await self._execute("CHECK", network, plugin, attachment, cached[1])

    async def delete(self, network: NetworkList | None, attachment: Attachment) -> None:
        """Undoes an ADD with the configuration it was done with; `network` serves if nothing was cached. Raises
        CniError."""
        cached = self._load(attachment)
        network, result = cached if cached else (network, None)
        if network is None:
            raise CniError(f"container {attachment.container_id}: neither a cached result nor a network configuration")
        if not version_at_least(network.cni_version, "0.4.0"):
            result = None
        for plugin in reversed(network.plugins):
            await self._execute("DEL", network, plugin, attachment, result)
        self._file(network.name, attachment).unlink(missing_ok=True)

    async def status(self, network: NetworkList) -> None:
        """Raises CniError if a plugin isn't ready for ADD (codes 50 and 51). Before 1.1.0 there is no STATUS."""
        if version_at_least(network.cni_version, "1.1.0"):
            for plugin in network.plugins:
                await self._execute("STATUS", network, plugin, None, None)

    async def collect(self, network: NetworkList, valid: Sequence[Attachment]) -> None:
        """GC: tells the plugins which attachments are still valid (1.1.0), and deletes cached ones that aren't.
        Raises CniError."""
        keep = {(a.container_id, a.ifname) for a in valid}
        for stale in self._cached_attachments():
            if (stale.container_id, stale.ifname) not in keep:
                await self.delete(network, stale)
        if network.disable_gc or not version_at_least(network.cni_version, "1.1.0"):
            return
        listed = [{"containerID": a.container_id, "ifname": a.ifname} for a in valid]
        for plugin in network.plugins:
            conf = dict(plugin) | {"cni.dev/valid-attachments": listed}
            await self._execute("GC", network, conf, None, None)

    # --- one execution -------------------------------------------------------------------------------------------

    def find(self, plugin: str) -> Path:
        """Raises CniError."""
        for directory in self._path:
            if (directory / plugin).is_file():
                return directory / plugin
        raise CniError(f"plugin {plugin} not found in {os.pathsep.join(map(str, self._path))}", 0)

    async def _execute(
        self,
        command: str,
        network: NetworkList,
        plugin: Mapping[str, Any],
        attachment: Attachment | None,
        prev: Mapping[str, Any] | None,
    ) -> dict[str, Any] | None:
        program = self.find(plugin["type"])
        what = f"plugin {plugin['type']}, {command}"
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(
                program, stdin=pipe, stdout=pipe, stderr=pipe, env=environment(command, self._path, attachment),
                start_new_session=True,
            )  # fmt: skip
        except OSError as e:
            raise CniError(f"{what}: {e.strerror}") from None
        try:
            async with asyncio.timeout(self._timeout):
                out, err = await process.communicate(plugin_config(network, plugin, attachment, prev))
        except TimeoutError:
            raise CniError(f"{what}: no answer in {self._timeout:.0f} s") from None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)  # with what it started, which would keep our pipes open
                await process.wait()
        return _interpret(what, process.returncode or 0, out, err)

    # --- cache (libcni's format, kind cniCacheV1) ------------------------------------------------------------------

    def _file(self, network: str, attachment: Attachment) -> Path:
        return self._cache / f"{network}-{attachment.container_id}-{attachment.ifname}"

    def _store(self, network: NetworkList, attachment: Attachment, result: Mapping[str, Any]) -> None:
        self._cache.mkdir(parents=True, exist_ok=True, mode=0o700)
        entry = {
            "kind": "cniCacheV1",
            "containerId": attachment.container_id,
            "config": base64.b64encode(network.raw).decode(),
            "ifName": attachment.ifname,
            "networkName": network.name,
            "netns": attachment.netns,
            "cniArgs": [list(a) for a in attachment.args],
            "capabilityArgs": dict(attachment.capabilities),
            "result": result,
        }
        path = self._file(network.name, attachment)
        tmp = path.with_name(f".{path.name}")
        with tmp.open("w") as f:
            json.dump(entry, f)
            f.flush()
            os.fsync(f.fileno())
        tmp.rename(path)

    def _entries(self) -> list[dict[str, Any]]:
        entries = []
        for path in sorted(self._cache.glob("[!.]*")) if self._cache.is_dir() else ():
            try:
                entry = json.loads(path.read_bytes())
            except (OSError, ValueError):
                continue
            if isinstance(entry, dict) and entry.get("kind") == "cniCacheV1":
                entries.append(entry)
        return entries

    def _load(self, attachment: Attachment) -> tuple[NetworkList, dict[str, Any]] | None:
        for entry in self._entries():
            if (entry["containerId"], entry["ifName"]) == (attachment.container_id, attachment.ifname):
                return parse_list(base64.b64decode(entry["config"]), "cached configuration"), entry["result"]
        return None

    def _cached_attachments(self) -> list[Attachment]:
        return [
            Attachment(
                e["containerId"],
                e.get("netns", ""),
                e["ifName"],
                tuple((k, v) for k, v in e.get("cniArgs") or ()),
                e.get("capabilityArgs") or {},
            )
            for e in self._entries()
        ]


def _interpret(what: str, code: int, out: bytes, err: bytes) -> dict[str, Any] | None:
    """A plugin's answer (specification, section 5). Raises CniError."""
    if len(out) > MAX_OUTPUT:
        raise CniError(f"{what}: more than {MAX_OUTPUT >> 20} MiB of output")
    try:
        answer = json.loads(out) if out.strip() else None
    except ValueError:
        raise CniError(f"{what}: the output isn't JSON: {out[:200]!r}") from None
    if code == 0:
        if answer is not None and not isinstance(answer, dict):
            raise CniError(f"{what}: the result isn't an object")
        return answer
    if isinstance(answer, dict) and "msg" in answer:
        details = f" ({answer['details']})" if answer.get("details") else ""
        number = answer.get("code")
        raise CniError(f"{what}: {answer['msg']}{details}", number if isinstance(number, int) else 0)
    raise CniError(f"{what}: exit status {code}: {(err or out)[:500].decode(errors='replace').strip()}")
