"""The CNI runtime against the specification, with plugins that write down how they were called."""

import base64
import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from fimbria.lab.runner.cni import Attachment, CniError, Runtime, load_list, parse_list, plugin_config, result_addresses

PLUGIN = """#!{python} -I
import json, os, sys
conf = json.load(sys.stdin)
name = os.path.basename(sys.argv[0])
env = {{k: v for k, v in os.environ.items() if k.startswith("CNI_")}}
with open({log!r}, "a") as f:
    f.write(json.dumps({{"plugin": name, "env": env, "conf": conf}}) + "\\n")
say = conf.get("say", {{}}).get(env["CNI_COMMAND"])
if say is not None:
    print(say if isinstance(say, str) else json.dumps(say))
    sys.exit(conf.get("exit", 0))
if env["CNI_COMMAND"] == "ADD":
    fresh = {{"cniVersion": conf["cniVersion"], "interfaces": [{{"name": "eth0", "sandbox": "x"}}],
             "ips": [{{"address": "10.0.0.5/24", "interface": 0}}]}}
    result = conf.get("prevResult") or fresh
    result.setdefault("dns", {{}}).setdefault("search", []).append(name)
    print(json.dumps(result))
"""
POD = Attachment(
    "abc", "/run/netns/x", "eth0", (("IgnoreUnknown", "1"), ("K8S_POD_NAME", "web")), {"portMappings": [1]}
)


class Plugins:
    """Two recording plugins named one and two."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "log"
        self.bin = directory / "bin"
        self.cache = directory / "cache"
        self.bin.mkdir()
        for name in ("one", "two"):
            path = self.bin / name
            path.write_text(PLUGIN.format(python=sys.executable, log=str(self.log)))
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        self.runtime = Runtime([directory / "nothing", self.bin], self.cache)

    def calls(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []

    def forget(self) -> None:
        self.log.unlink(missing_ok=True)


@pytest.fixture
def plugins(tmp_path: Path) -> Plugins:
    return Plugins(tmp_path)


def network(version: str = "1.1.0", one: dict[str, Any] | None = None, **more: Any) -> Any:
    two = {"type": "two", "capabilities": {"portMappings": True, "other": True}}
    conf = {"cniVersion": version, "name": "net", "plugins": [{"type": "one", **(one or {})}, two], **more}
    return parse_list(json.dumps(conf).encode(), "test")


async def test_add_calls_in_order_and_hands_results_on(plugins: Plugins) -> None:
    result = await plugins.runtime.add(network(), POD)
    first, second = plugins.calls()
    assert (first["plugin"], second["plugin"]) == ("one", "two")
    assert first["env"] == {
        "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "abc", "CNI_NETNS": "/run/netns/x", "CNI_IFNAME": "eth0",
        "CNI_ARGS": "IgnoreUnknown=1;K8S_POD_NAME=web", "CNI_PATH": f"{plugins.bin.parent}/nothing:{plugins.bin}",
    }  # fmt: skip
    assert "prevResult" not in first["conf"]
    assert second["conf"]["prevResult"]["dns"]["search"] == ["one"]
    assert first["conf"]["name"] == second["conf"]["name"] == "net"
    assert first["conf"]["cniVersion"] == "1.1.0"
    assert "runtimeConfig" not in first["conf"] and "capabilities" not in second["conf"]
    assert second["conf"]["runtimeConfig"] == {"portMappings": [1]}
    assert result["dns"]["search"] == ["one", "two"]
    assert result_addresses(result) == ["10.0.0.5"]


async def test_del_in_reverse_with_the_cached_result_and_configuration(plugins: Plugins) -> None:
    result = await plugins.runtime.add(network(one={"mark": "old"}), POD)
    plugins.forget()
    await plugins.runtime.delete(network(one={"mark": "new"}), POD)
    calls = plugins.calls()
    assert [c["plugin"] for c in calls] == ["two", "one"]
    assert all(c["conf"]["prevResult"] == result for c in calls)
    assert calls[1]["conf"]["mark"] == "old", "what ADD was done with"
    assert not list((plugins.cache / "results").iterdir())
    plugins.forget()
    await plugins.runtime.delete(network(), POD)
    assert all("prevResult" not in c["conf"] for c in plugins.calls()), "a second DEL knows no result"


async def test_cache_is_libcnis(plugins: Plugins) -> None:
    await plugins.runtime.add(network(), POD)
    (path,) = (plugins.cache / "results").iterdir()
    assert path.name == "net-abc-eth0"
    entry = json.loads(path.read_text())
    assert entry["kind"] == "cniCacheV1"
    assert entry["cniArgs"] == [["IgnoreUnknown", "1"], ["K8S_POD_NAME", "web"]]
    assert json.loads(base64.b64decode(entry["config"]))["name"] == "net"
    assert (entry["containerId"], entry["ifName"], entry["networkName"], entry["netns"]) == (
        "abc",
        "eth0",
        "net",
        POD.netns,
    )


async def test_check_forward_with_the_final_result(plugins: Plugins) -> None:
    result = await plugins.runtime.add(network(), POD)
    plugins.forget()
    await plugins.runtime.check(network(), POD)
    calls = plugins.calls()
    assert [c["plugin"] for c in calls] == ["one", "two"]
    assert all(c["conf"]["prevResult"] == result and c["env"]["CNI_COMMAND"] == "CHECK" for c in calls)
    plugins.forget()
    await plugins.runtime.check(network(disableCheck=True), POD)
    await plugins.runtime.check(network("0.3.1"), POD)
    assert plugins.calls() == []


async def test_old_versions_get_no_result_on_del(plugins: Plugins) -> None:
    await plugins.runtime.add(network("0.3.1"), POD)
    plugins.forget()
    await plugins.runtime.delete(network("0.3.1"), POD)
    assert all("prevResult" not in c["conf"] for c in plugins.calls())


async def test_status_and_gc_only_since_1_1(plugins: Plugins) -> None:
    await plugins.runtime.status(network("1.0.0"))
    await plugins.runtime.collect(network("1.0.0"), [POD])
    assert plugins.calls() == []
    await plugins.runtime.status(network())
    assert [(c["plugin"], c["env"]["CNI_COMMAND"]) for c in plugins.calls()] == [("one", "STATUS"), ("two", "STATUS")]
    assert "CNI_CONTAINERID" not in plugins.calls()[0]["env"]


async def test_gc_deletes_what_is_not_valid_and_tells_what_is(plugins: Plugins) -> None:
    stale = Attachment("stale", "", "eth0")
    await plugins.runtime.add(network(), POD)
    await plugins.runtime.add(network(), stale)
    plugins.forget()
    await plugins.runtime.collect(network(), [POD])
    calls = plugins.calls()
    assert [(c["plugin"], c["env"]["CNI_COMMAND"], c["env"].get("CNI_CONTAINERID")) for c in calls] == [
        ("two", "DEL", "stale"), ("one", "DEL", "stale"), ("one", "GC", None), ("two", "GC", None)]  # fmt: skip
    assert calls[2]["conf"]["cni.dev/valid-attachments"] == [{"containerID": "abc", "ifname": "eth0"}]


@pytest.mark.parametrize(
    ("say", "status", "message"),
    [
        ({"cniVersion": "1.1.0", "code": 11, "msg": "later", "details": "busy"}, 1, r"plugin one, ADD: later \(busy\)"),
        ("this is no JSON", 0, "isn't JSON"),
        ("[]", 0, "isn't an object"),
        ("", 0, "gave no result"),
        ({"foo": 1}, 0, "without cniVersion"),
        ({}, 3, "exit status 3"),
    ],
)
async def test_bad_answers_are_errors(plugins: Plugins, say: object, status: int, message: str) -> None:
    with pytest.raises(CniError, match=message) as caught:
        await plugins.runtime.add(network(one={"say": {"ADD": say}, "exit": status}), POD)
    assert caught.value.code == (11 if "later" in message else 0)
    assert not (plugins.cache / "results").exists(), "a failed ADD has no result"


async def test_missing_plugin_and_slow_plugin(tmp_path: Path, plugins: Plugins) -> None:
    (plugins.bin / "one").write_text("#!/bin/sh\nsleep 30\n")
    with pytest.raises(CniError, match=r"plugin one, STATUS: no answer"):
        await Runtime([plugins.bin], tmp_path, timeout=0.1).status(network())
    (plugins.bin / "one").unlink()
    with pytest.raises(CniError, match="plugin one not found"):
        await plugins.runtime.status(network())


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("{", "not JSON"),
        ("[]", "an object"),
        ('{"name":"x","cniVersion":"1.0.0"}', "no plugins"),
        ('{"name":"x","cniVersion":"1.0.0","plugins":[]}', "no plugins"),
        ('{"name":"../x","cniVersion":"1.0.0","plugins":[{"type":"a"}]}', "name is missing or invalid"),
        ('{"name":"x","cniVersion":"9.0.0","plugins":[{"type":"a"}]}', "9.0.0"),
        ('{"name":"x","cniVersion":"1.0.0","plugins":[{"type":"../a"}]}', "without a valid type"),
        ('{"name":"x","cniVersion":"1.0.0","plugins":[3]}', "without a valid type"),
    ],
)
def test_bad_configurations(raw: str, message: str) -> None:
    with pytest.raises(CniError, match=message):
        parse_list(raw.encode(), "file")


def test_first_file_in_lexical_order_and_single_plugins(tmp_path: Path) -> None:
    with pytest.raises(CniError, match="no network configuration"):
        load_list(tmp_path)
    (tmp_path / "20-b.conflist").write_text('{"name":"b","cniVersion":"1.0.0","plugins":[{"type":"x"}]}')
    (tmp_path / "10-a.conf").write_text('{"name":"a","cniVersion":"0.4.0","type":"y"}')
    (tmp_path / "00.txt").write_text("no")
    first = load_list(tmp_path)
    assert (first.name, first.plugins[0]["type"]) == ("a", "y")
    assert json.loads(plugin_config(first, first.plugins[0], None, None))["name"] == "a"


def test_newest_known_version_of_several() -> None:
    conf = '{"name":"b","cniVersion":"1.0.0","cniVersions":["0.4.0","1.1.0","2.0.0"],"plugins":[{"type":"x"}]}'
    assert parse_list(conf.encode(), "f").cni_version == "1.1.0"


@pytest.mark.parametrize(
    "result",
    [
        {"ips": [{"address": "10.0.0.1/24", "interface": 3}], "interfaces": [{"name": "eth0", "sandbox": "x"}]},
        {"ips": [{"address": 5}]},
        {"ips": "x"},
        {"ips": []},
        {},
        {"ips": [{"address": "10.0.0.1/24", "interface": 0}], "interfaces": [{"name": "veth"}]},
    ],
)
def test_unusable_results(result: dict[str, Any]) -> None:
    with pytest.raises(CniError):
        result_addresses(result)
