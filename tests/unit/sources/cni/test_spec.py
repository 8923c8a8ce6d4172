"""Requests, results and errors against the words of the CNI specification 1.1.0 and of the versions before it."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fimbria.model.address import pack
from fimbria.model.endpoint import HostPort
from fimbria.sources.cni.spec import (
    COMMANDS,
    PROTOCOL,
    SUPPORTED,
    Address,
    CniError,
    Code,
    Interface,
    Request,
    Result,
    ResultRoute,
    encode_error,
    encode_result,
    parse,
    parse_prev_result,
    peek_version,
)

NETNS = "/run/netns/blue"
ENV = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": NETNS, "CNI_IFNAME": "eth0"}
CONF = {"cniVersion": "1.1.0", "name": "fimbria", "type": "fimbria-cni"}
RESULT = Result(
    (Interface("fim0", "02:00:00:00:00:01", mtu=1450), Interface("eth0", "02:00:00:00:00:02", NETNS, 1450)),
    (Address(pack("10.0.0.5"), 32, pack("10.0.0.1"), 1), Address(pack("fd00::5"), 128, pack("fd00::1"), 1)),
    (ResultRoute("0.0.0.0/0", pack("10.0.0.1"), 1450), ResultRoute("::/0", pack("fd00::1"), 1450)),
    {"nameservers": ["10.96.0.10"]},
)


def request(env: Mapping[str, str] | None = None, conf: Mapping[str, Any] | None = None, fd: int = 3) -> Request:
    return parse({**ENV, **(env or {})}, json.dumps({**CONF, **(conf or {})}).encode(), fd)


def refused(env: Mapping[str, str] | None = None, conf: Mapping[str, Any] | None = None, fd: int = 3) -> CniError:
    with pytest.raises(CniError) as caught:
        request(env, conf, fd)
    return caught.value


# --- results: the fields of each version's specification, no more and no less ------------------------------------


@pytest.mark.parametrize("version", SUPPORTED)
def test_result_has_the_fields_of_its_version(version: str) -> None:
    """interfaces, ips, routes, dns as in SPEC.md of v0.3.0, v0.3.1, v0.4.0, v1.0.0 and v1.1.0."""
    body = json.loads(encode_result(RESULT, version))
    assert body.keys() == {"cniVersion", "interfaces", "ips", "routes", "dns"}
    assert body["cniVersion"] == version
    new = version == "1.1.0"
    mtu = {"mtu"} if new else set()
    host, pod = body["interfaces"]
    assert host.keys() == {"name", "mac"} | mtu
    assert pod.keys() == {"name", "mac", "sandbox"} | mtu
    assert pod["sandbox"] == NETNS
    ip_version = {"version"} if version in ("0.3.0", "0.3.1", "0.4.0") else set()
    assert all(ip.keys() == {"address", "gateway", "interface"} | ip_version for ip in body["ips"])
    assert [ip["address"] for ip in body["ips"]] == ["10.0.0.5/32", "fd00::5/128"]
    assert {body["interfaces"][ip["interface"]]["name"] for ip in body["ips"]} == {"eth0"}
    if ip_version:
        assert [ip["version"] for ip in body["ips"]] == ["4", "6"]
    assert all(r.keys() == {"dst", "gw"} | mtu for r in body["routes"])
    assert [(r["dst"], r["gw"]) for r in body["routes"]] == [("0.0.0.0/0", "10.0.0.1"), ("::/0", "fd00::1")]
    assert body["dns"] == {"nameservers": ["10.96.0.10"]}


@pytest.mark.parametrize("version", SUPPORTED)
def test_our_result_is_a_prev_result_that_we_understand(version: str) -> None:
    seen = parse_prev_result(json.loads(encode_result(RESULT, version)))
    assert dict(seen.macs) == {"eth0": "02:00:00:00:00:02"}
    assert seen.addresses == {"10.0.0.5", "fd00::5"}
    assert seen.routes == {"0.0.0.0/0", "::/0"}


def test_an_error_has_the_fields_of_the_specification_and_the_version_of_its_request() -> None:
    body = json.loads(encode_error(CniError(Code.INVALID_CONFIG, "short", "long"), "0.4.0"))
    assert body == {"cniVersion": "0.4.0", "code": 7, "msg": "short", "details": "long"}


@pytest.mark.parametrize(
    ("config", "version"),
    [
        (b'{"cniVersion": "0.3.1"}', "0.3.1"),
        (b'{"cniVersion": "9.9.9"}', "9.9.9"),
        (b'{"prevResult": {"cniVersion": "0.3.1"}, "cniVersion": "1.0.0"}', "1.0.0"),
        (b"{}", "0.1.0"),  # the first version had no such key
        (b'{"cniVersion": 1}', "0.1.0"),
        (b"[]", "1.1.0"),
        (b"", "1.1.0"),
        (b"\xff", "1.1.0"),
        (b"[" * 100_000, "1.1.0"),
    ],
)
def test_the_version_of_an_error_answer(config: bytes, version: str) -> None:
    assert peek_version(config) == version


# --- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "since"),
    [("ADD", "0.3.0"), ("DEL", "0.3.0"), ("CHECK", "0.4.0"), ("STATUS", "1.1.0"), ("GC", "1.1.0")],
)
def test_commands_by_version(command: str, since: str) -> None:
    for version in SUPPORTED:
        if SUPPORTED.index(version) >= SUPPORTED.index(since):
            assert request({"CNI_COMMAND": command}, {"cniVersion": version}).version == version
        else:
            assert refused({"CNI_COMMAND": command}, {"cniVersion": version}).code == Code.INCOMPATIBLE_VERSION


def test_a_shim_of_another_release() -> None:
    """During an upgrade: an older one, that doesn't say what it speaks, works; a newer protocol isn't guessed at."""
    assert request({"FIMBRIA_PROTOCOL": str(PROTOCOL)}) == request()
    assert request({"SOMETHING_NEW": "x"}) == request()
    for spoken in (str(PROTOCOL + 1), "", "two", "-1"):
        error = refused({"FIMBRIA_PROTOCOL": spoken})
        assert error.code == Code.TRY_AGAIN_LATER
        assert f"protocol {spoken}," in error.msg and "releases" in error.details


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", "1.2.0", "2.0.0", "", "v1.1.0", 1.1, None, ["1.1.0"], {}])
def test_versions_we_do_not_speak(version: object) -> None:
    error = refused(conf={"cniVersion": version})
    assert error.code == Code.INCOMPATIBLE_VERSION
    assert json.dumps(version) in error.msg
    assert "1.1.0" in error.details


def test_a_configuration_without_a_version_is_of_the_first_one() -> None:
    with pytest.raises(CniError) as caught:
        parse(ENV, b'{"name": "fimbria"}', 3)
    assert caught.value.code == Code.INCOMPATIBLE_VERSION


def test_a_list_of_versions_in_the_plugins_own_object_changes_nothing() -> None:
    """Runtimes choose from cniVersions and put what they chose into cniVersion (section 1, version selection)."""
    assert request(conf={"cniVersion": "1.0.0", "cniVersions": ["0.3.1", "1.1.0"]}).version == "1.0.0"


# --- parameters --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["", "add", "VERSION", "INFO", "ADD "])
def test_a_command_that_does_not_exist(command: str) -> None:
    error = refused({"CNI_COMMAND": command})
    assert error.code == Code.INVALID_ENVIRONMENT
    assert "CNI_COMMAND" in error.msg


@pytest.mark.parametrize("container", ["a", "0", "A_b.c-d", "f" * 64, "x" * 256])
def test_container_ids(container: str) -> None:
    assert request({"CNI_CONTAINERID": container}).container_id == container


@pytest.mark.parametrize("container", ["", "_a", ".a", "-a", "a/b", "a b", "a\n", "ä", "a\x00", "x" * 257])
@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK"])
def test_container_ids_that_are_none(container: str, command: str) -> None:
    error = refused({"CNI_CONTAINERID": container, "CNI_COMMAND": command})
    assert error.code == Code.INVALID_ENVIRONMENT
    assert "CNI_CONTAINERID" in error.msg


@pytest.mark.parametrize("ifname", ["eth0", "a", "x" * 15, "net1.5", "é0", "a-b_c"])
def test_interface_names(ifname: str) -> None:
    assert request({"CNI_IFNAME": ifname}).owner == f"c1/{ifname}"


@pytest.mark.parametrize(
    "ifname",
    ["", ".", "..", "x" * 16, "é" * 8, "a/b", "a:b", "a b", "a\t", "eth%d", "%", "\ufffd"],
)
@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK"])
def test_interface_names_that_the_kernel_refuses_or_reads_otherwise(ifname: str, command: str) -> None:
    error = refused({"CNI_IFNAME": ifname, "CNI_COMMAND": command})
    assert error.code == Code.INVALID_ENVIRONMENT
    assert "CNI_IFNAME" in error.msg


@pytest.mark.parametrize(("command", "needed"), [("ADD", True), ("CHECK", True), ("DEL", False)])
def test_the_namespace(command: str, needed: bool) -> None:
    for env, fd in (({"CNI_NETNS": ""}, -1), ({"CNI_NETNS": "/gone"}, -1)):
        env = {"CNI_COMMAND": command, **env}
        if needed:
            error = refused(env, fd=fd)
            assert error.code == Code.INVALID_ENVIRONMENT
            assert "CNI_NETNS" in error.msg
        else:
            assert request(env, fd=fd).netns_fd == -1


@pytest.mark.parametrize("command", ["STATUS", "GC"])
def test_commands_without_an_attachment_ask_for_none(command: str) -> None:
    parsed = parse({"CNI_COMMAND": command, "CNI_ARGS": "garbage"}, json.dumps(CONF).encode(), -1)
    assert parsed.command == command


def test_arguments() -> None:
    args = "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=u1;X=a=b;EMPTY=;"
    parsed = request({"CNI_ARGS": args})
    assert parsed.pod == ("default", "web-0")
    assert parsed.args["X"] == "a=b"
    assert parsed.args["EMPTY"] == ""
    assert request({"CNI_ARGS": ""}).pod is None
    assert request({"CNI_ARGS": "K8S_POD_NAME=web-0"}).pod is None


def test_unknown_arguments_are_ignored_with_and_without_ignore_unknown() -> None:
    for args in ("FOO=BAR", "IgnoreUnknown=0;FOO=BAR", "IgnoreUnknown=true;FOO=BAR"):
        assert request({"CNI_ARGS": args}).args["FOO"] == "BAR"


@pytest.mark.parametrize("args", ["novalue", "a=b;c", "=x", " "])
def test_arguments_that_are_no_pairs(args: str) -> None:
    error = refused({"CNI_ARGS": args})
    assert error.code == Code.INVALID_ENVIRONMENT
    assert "CNI_ARGS" in error.msg


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stdin", [b"", b" \n", b"{", b"\xff\xfe", b"[]", b'"x"', b"1", b"[" * 100_000, b'{"a":' * 9999]
)
def test_a_configuration_that_is_none(stdin: bytes) -> None:
    for command in COMMANDS:
        with pytest.raises(CniError) as caught:
            parse({**ENV, "CNI_COMMAND": command}, stdin, 3)
        assert caught.value.code == Code.DECODE_FAILURE


@pytest.mark.parametrize("name", ["", None, 5, "-a", "a/b", "a b", "../x", []])
def test_network_names(name: object) -> None:
    assert refused(conf={"name": name}).code == Code.INVALID_CONFIG


def test_unknown_fields_are_tolerated() -> None:
    extra = {"keyA": ["some", "more"], "cni.dev/future": {}, "args": {"cni": {}}, "ipMasq": True, "capabilities": {}}
    assert request(conf=extra).config["keyA"] == ["some", "more"]


@pytest.mark.parametrize(
    ("field", "shown"),
    [
        ({"runtimeConfig": {"bandwidth": {"ingressRate": 1}}}, "runtimeConfig.bandwidth"),
        ({"runtimeConfig": {"mac": "00:11:22:33:44:55"}}, "runtimeConfig.mac"),
        ({"ipam": {"type": "host-local"}}, "ipam"),
    ],
)
def test_what_we_do_not_do_is_refused_by_name_and_value(field: dict[str, Any], shown: str) -> None:
    """Code 2: the error message must contain the key and value of the unsupported field. A port mapping that silently
    isn't there would be worse than a pod that doesn't start."""
    error = refused(conf=field)
    assert error.code == Code.UNSUPPORTED_FIELD
    assert shown in error.msg
    value = field.get("ipam") or next(iter(field["runtimeConfig"].values()))
    assert json.dumps(value) in error.msg
    assert request({"CNI_COMMAND": "DEL"}, field).command == "DEL"  # what was never made must be removable


MAPPING = {"hostPort": 8080, "containerPort": 80, "protocol": "tcp", "hostIP": ""}


def mapped(*rows: object) -> tuple[HostPort, ...]:
    return request(conf={"runtimeConfig": {"portMappings": list(rows)}}).host_ports


def test_port_mappings_are_read() -> None:
    """CNI conventions, "portMappings": protocol in lower case, hostIP may be missing."""
    assert mapped(MAPPING) == (HostPort(8080, 80, 6),)
    assert mapped(MAPPING, MAPPING | {"protocol": "UDP"}, MAPPING) == (HostPort(8080, 80, 6), HostPort(8080, 80, 17))
    assert mapped({"hostPort": 1, "containerPort": 65535}) == (HostPort(1, 65535, 6),)
    ips = {"192.0.2.1": pack("192.0.2.1"), "fd00::1": pack("fd00::1"), "0.0.0.0": pack("0.0.0.0"), "::": pack("::")}
    for text, ip in ips.items():
        assert mapped(MAPPING | {"hostIP": text}) == (HostPort(8080, 80, 6, ip),)
    assert request().host_ports == ()
    written_by_containerd = {"HostPort": 8080, "ContainerPort": 80, "Protocol": "udp", "HostIP": "192.0.2.1"}
    assert mapped(written_by_containerd) == (HostPort(8080, 80, 17, ips["192.0.2.1"]),)


@pytest.mark.parametrize(
    "row",
    [
        8080, None, [], {"hostPort": 8080}, {"containerPort": 80}, MAPPING | {"hostPort": 0},
        MAPPING | {"hostPort": -1},
        MAPPING | {"hostPort": 65536}, MAPPING | {"hostPort": "8080"}, MAPPING | {"hostPort": True},
        MAPPING | {"containerPort": 80.0}, MAPPING | {"protocol": "icmp"}, MAPPING | {"protocol": 6},
        MAPPING | {"hostIP": "node1"}, MAPPING | {"hostIP": "1.2.3.4/24"}, MAPPING | {"hostIP": 7},
        MAPPING | {"hostIP": "\ud800"}, MAPPING | {"hostIP": "1.2.3.4\0"},
    ],
)  # fmt: skip
def test_port_mappings_that_can_not_be_read_are_refused(row: object) -> None:
    refusal = refused(conf={"runtimeConfig": {"portMappings": [MAPPING, row]}})
    assert refusal.code == Code.INVALID_CONFIG
    assert "portMappings" in refusal.msg


def test_too_many_port_mappings_are_refused() -> None:
    assert refused(conf={"runtimeConfig": {"portMappings": [MAPPING] * 1025}}).code == Code.INVALID_CONFIG
    assert refused(conf={"runtimeConfig": {"portMappings": {"8080": 80}}}).code == Code.INVALID_CONFIG


def test_empty_capability_arguments_ask_for_nothing() -> None:
    assert request(conf={"runtimeConfig": {"portMappings": []}}).command == "ADD"
    assert request(conf={"runtimeConfig": None}).command == "ADD"


@pytest.mark.parametrize("conf", [{"dns": "10.0.0.1"}, {"runtimeConfig": [1]}])
def test_fields_of_the_wrong_kind(conf: dict[str, Any]) -> None:
    assert refused(conf=conf).code == Code.INVALID_CONFIG


# --- prevResult and GC -------------------------------------------------------------------------------------------


def test_add_must_come_first_in_a_chain() -> None:
    error = refused(conf={"prevResult": {"cniVersion": "1.1.0", "interfaces": []}})
    assert error.code == Code.INVALID_CONFIG
    assert "first plugin" in error.msg
    assert "prevResult" in error.details


def test_the_result_of_a_whole_chain() -> None:
    """What a plugin after us adds (an interface of its own, an address outside the container) doesn't confuse us."""
    prev = json.loads(encode_result(RESULT, "1.0.0"))
    prev["interfaces"].append({"name": "ifb0", "mac": "02:00:00:00:00:03"})
    prev["ips"].append({"address": "203.0.113.7/32"})
    prev["routes"].append({"dst": "192.0.2.0/24"})
    seen = request({"CNI_COMMAND": "CHECK"}, {"prevResult": prev}).prev_result
    assert seen is not None
    assert seen.macs.keys() == {"eth0"}
    assert "203.0.113.7" in seen.addresses
    assert "192.0.2.0/24" in seen.routes


@pytest.mark.parametrize(
    "prev",
    [
        [], "x", 1, True, {"ips": 1}, {"ips": [1]}, {"ips": [{}]}, {"ips": [{"address": None}]}, {"interfaces": {}},
        {"interfaces": [{"sandbox": "/x"}]}, {"routes": [{"gw": "10.0.0.1"}]}, {"routes": "0.0.0.0/0"},
    ],
)  # fmt: skip
def test_a_prev_result_that_is_none(prev: object) -> None:
    parsed = request({"CNI_COMMAND": "CHECK"}, {"prevResult": prev})
    with pytest.raises(CniError) as caught:
        _ = parsed.prev_result
    assert caught.value.code == Code.INVALID_CONFIG
    assert "prevResult" in caught.value.msg


def test_empty_parts_of_a_prev_result_are_allowed() -> None:
    assert parse_prev_result({"ips": None, "interfaces": None}).addresses == frozenset()
    assert request({"CNI_COMMAND": "CHECK"}).prev_result is None


@pytest.mark.parametrize("key", ["cni.dev/valid-attachments", "cni.dev/attachments"])
def test_valid_attachments(key: str) -> None:
    rows = [{"containerID": "c1", "ifname": "eth0"}, {"containerID": "c1", "ifname": "net1", "more": 1}]
    assert request({"CNI_COMMAND": "GC"}, {key: rows}).valid_attachments == {"c1/eth0", "c1/net1"}
    for empty in ([], None):  # null is how Go writes an empty list
        assert request({"CNI_COMMAND": "GC"}, {key: empty}).valid_attachments == frozenset()


@pytest.mark.parametrize(
    "rows",
    ["", 0, False, {}, "c1", {"containerID": "c1"}, [{"containerID": "c1"}], [{"ifname": "eth0"}], ["c1"], [None],
     [{"containerID": 1, "ifname": "eth0"}], [{"containerID": "", "ifname": "eth0"}]],
)  # fmt: skip
def test_gc_never_guesses(rows: object) -> None:
    """A misread list would take the network of pods that run."""
    parsed = request({"CNI_COMMAND": "GC"}, {"cni.dev/valid-attachments": rows})
    with pytest.raises(CniError) as caught:
        _ = parsed.valid_attachments
    assert caught.value.code == Code.INVALID_CONFIG


def test_gc_without_a_list_removes_nothing() -> None:
    with pytest.raises(CniError) as caught:
        _ = request({"CNI_COMMAND": "GC"}).valid_attachments
    assert caught.value.code == Code.INVALID_CONFIG
    assert "cni.dev/valid-attachments" in caught.value.msg


# --- anything at all ---------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["cniVersion", "name", "type", "prevResult", "runtimeConfig", "dns", "ipam", "cni.dev/valid-attachments", "args"]
)
NAMES = ("CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS")


def swallow(env: Mapping[str, str], stdin: bytes, fd: int) -> None:
    """Only CniError may come out, and it must be encodable."""
    try:
        parsed = parse(env, stdin, fd)
        _ = parsed.owner, parsed.pod
        for lazy in ("prev_result", "valid_attachments"):
            try:
                getattr(parsed, lazy)
            except CniError:
                continue
    except CniError as error:
        body = json.loads(encode_error(error, peek_version(stdin)))
        assert body["code"] == error.code
        assert body["msg"]


@given(st.dictionaries(st.sampled_from(NAMES), st.text(max_size=30)), st.binary(max_size=200), st.integers(-1, 5))
def test_arbitrary_bytes(env: dict[str, str], stdin: bytes, fd: int) -> None:
    swallow(env, stdin, fd)


@given(st.sampled_from(COMMANDS), st.dictionaries(KEYS, JSON), st.sampled_from(SUPPORTED))
def test_arbitrary_configurations(command: str, conf: dict[str, Any], version: str) -> None:
    swallow({**ENV, "CNI_COMMAND": command}, json.dumps(conf).encode(), 3)
    swallow({**ENV, "CNI_COMMAND": command}, json.dumps(conf | {"cniVersion": version, "name": "n"}).encode(), 3)


@given(JSON, JSON, JSON)
def test_arbitrary_results(interfaces: Any, ips: Any, routes: Any) -> None:
    try:
        parse_prev_result({"interfaces": interfaces, "ips": ips, "routes": routes})
    except CniError as error:
        assert error.code == Code.INVALID_CONFIG
