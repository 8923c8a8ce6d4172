"""Bad input through the real API: what is wrong is said (a condition, an event, a clear line in the log), nothing else
breaks, and once it is mended everything recovers by itself, without a restart and soon.

The agent is a real one, on a node of a lab; the operator is a process of the test's. Both use service accounts with the
chart's own roles and reach the real API server through a proxy that can fail in their way (faulty.py)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import yaml

from fimbria.lab import cluster, components
from fimbria.lab.handle import Lab
from fimbria.lab.layout import LabSpec

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).parents[2]
NAMESPACE = "kube-system"
AGENT = "node1/agent"
ALONE = "--no-leader-elect"  # a killed leader keeps the next one waiting
SOON = 40.0  # seconds to recover: the longest pause between two tries is 30
BASE = "/apis/cilium.io/v2"
RBAC = "/apis/rbac.authorization.k8s.io/v1"
ADMISSION = "/apis/admissionregistration.k8s.io/v1"
T = TypeVar("T")


def _load(name: str) -> ModuleType:
    import importlib.util

    known = f"fimbria_kube_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, Path(__file__).with_name(f"{name}.py"))
        assert spec and spec.loader
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


faulty, realserver, kube = _load("faulty"), _load("realserver"), _load("conftest")


@dataclass
class Bed:
    """The server, the proxy before it, and how to say who asks."""

    folder: Path
    admin: Any
    proxy: Any
    pair: Any
    roles: dict[str, dict[str, Any]] = field(default_factory=dict)

    def kubeconfig(self, account: str) -> Path:
        """For a service account, by files that can be rotated."""
        token = self.folder / f"{account}.token"
        self.renew(account)
        path = self.folder / f"{account}.kubeconfig"
        self.authority.write_bytes(self.pair.cert.read_bytes())
        document = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": f"https://127.0.0.1:{self.proxy.port}",
                                                   "certificate-authority": str(self.authority)}}],
            "users": [{"name": "u", "user": {"tokenFile": str(token)}}],
        }  # fmt: skip
        path.write_text(yaml.safe_dump(document))
        return path

    @property
    def authority(self) -> Path:
        return self.folder / "authority.crt"

    def renew(self, account: str) -> None:
        """A new token, bound to a Secret: the token dies with it."""
        secret = f"{account}-{time.monotonic_ns()}"
        made = self.admin.post(f"/api/v1/namespaces/{NAMESPACE}/secrets", {"metadata": {"name": secret}})
        bound = {"kind": "Secret", "apiVersion": "v1", "name": secret, "uid": made["metadata"]["uid"]}
        spec = {"spec": {"boundObjectRef": bound, "expirationSeconds": 3600}}
        path = f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{account}/token"
        (self.folder / f"{account}.token").write_text(self.admin.post(path, spec)["status"]["token"])
        (self.folder / f"{account}.secret").write_text(secret)

    def revoke(self, account: str) -> None:
        secret = (self.folder / f"{account}.secret").read_text()
        self.admin.delete(f"/api/v1/namespaces/{NAMESPACE}/secrets/{secret}")

    @contextmanager
    def without(self, role: str, group: str, plural: str, verb: str) -> Iterator[None]:
        """The role lacks one right."""
        whole = self.admin.get(f"{RBAC}/clusterroles/{role}")
        rules = [
            {"apiGroups": [g], "resources": [r], "verbs": [v]}
            for g, r, v in rights(whole) if (g, r, v) != (group, plural, verb)
        ]  # fmt: skip
        self.admin.patch(f"{RBAC}/clusterroles/{role}", {"rules": rules})
        try:
            until("the server knows", lambda: not self.may(role, group, plural, verb))
            yield
        finally:
            self.admin.patch(f"{RBAC}/clusterroles/{role}", {"rules": whole["rules"]})
        until("the server knows", lambda: self.may(role, group, plural, verb))

    def may(self, account: str, group: str, plural: str, verb: str, namespace: str = "") -> bool:
        """Whether the server grants it by now: it learns of roles by a watch. Accounts have their role's name."""
        resource, _, part = plural.partition("/")
        asked = {"group": group, "resource": resource, "subresource": part, "verb": verb, "namespace": namespace}
        spec = {"user": f"system:serviceaccount:{NAMESPACE}:{account}", "resourceAttributes": asked}
        path = "/apis/authorization.k8s.io/v1/subjectaccessreviews"
        return bool(self.admin.post(path, {"spec": spec})["status"]["allowed"])

    @contextmanager
    def webhook(
        self, judge: Any, kind: str, plural: str, *operations: str, provoke: Callable[[], Any]
    ) -> Iterator[Any]:  # fmt: skip
        """At work within: the server learns of it by a watch, too. `provoke` is a request that it is asked about."""
        hook = faulty.Webhook(self.pair, judge)
        hook.start()
        path = f"{ADMISSION}/{kind.lower()}s"
        self.admin.post(path, hook.configuration("fim-bad-input", kind, "cilium.io", plural, *operations))

        def asked() -> bool:
            provoke()
            return bool(hook.asked)

        try:
            until("the webhook is asked", asked)
            yield hook
        finally:
            self.admin.delete(f"{path}/fim-bad-input")
            hook.stop()

    def events(self, namespace: str, name: str) -> list[dict[str, Any]]:
        found = self.admin.get(f"/api/v1/namespaces/{namespace}/events")["items"]
        return [e for e in found if e["involvedObject"]["name"] == name]


def rights(role: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Group, resource and verb of every right of a role."""
    return sorted({(g, r, v) for rule in role["rules"] for g in rule["apiGroups"] for r in rule["resources"]
                   for v in rule["verbs"]})  # fmt: skip


def until(what: str, check: Callable[[], T], seconds: float = SOON) -> T:
    deadline = time.monotonic() + seconds
    while True:
        found = check()
        if found:
            return found
        assert time.monotonic() < deadline, f"{what}: not after {seconds:.0f} s ({found!r})"
        time.sleep(0.1)


@dataclass
class Log:
    """What a process says from a point on."""

    path: Path
    start: int = 0

    def mark(self) -> None:
        self.start = self.path.stat().st_size

    def text(self) -> str:
        with self.path.open() as file:
            file.seek(self.start)
            return file.read()

    def line(self, pattern: str, seconds: float = SOON) -> str:
        """The first line that matches. Fails with what was said instead."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := re.search(f"^.*{pattern}.*$", self.text(), re.MULTILINE):
                return found[0]
            time.sleep(0.1)
        raise AssertionError(f"nothing like {pattern!r} was said:\n{self.text()[-3000:]}")


@pytest.fixture(scope="module")
def bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    folder = tmp_path_factory.mktemp("fim-bad")
    # Without ServiceAccount admission pods need no account; the webhook's address is this machine's.
    with ExitStack() as stack:
        kubeconfig = stack.enter_context(realserver.real_apiserver(folder / "server"))
        admin = kube.Client("real", kubeconfig)
        pair = faulty.Pair.make(folder, "first")
        proxy = faulty.Proxy(kubeconfig, pair)
        proxy.start()
        stack.callback(proxy.stop)
        found = Bed(folder, admin, proxy, pair)
        # The server makes its own namespaces after it has called itself ready.
        for name in ("default", NAMESPACE):
            admin.eventually(lambda name=name: admin.call("GET", f"/api/v1/namespaces/{name}").code == 200)
        for manifest in _chart():
            _apply(found, manifest)
        yield found


def _chart() -> list[dict[str, Any]]:
    """Roles, bindings and accounts as the chart makes them."""
    helm = realserver.binaries("helm") / "helm"
    parts = ("rbac-agent", "rbac-operator", "serviceaccounts")
    shown = [f"--show-only=templates/{part}.yaml" for part in parts]
    chart = str(ROOT / "deploy/fimbria")
    command = [str(helm), "template", "fimbria", chart, "--namespace", NAMESPACE, "--set"]
    done = subprocess.run([*command, "ciliumEndpointSlice.enabled=true", *shown],
                          capture_output=True, text=True, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [m for m in yaml.safe_load_all(done.stdout) if m]


def _apply(bed: Bed, manifest: dict[str, Any]) -> None:
    paths = {"ServiceAccount": f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts",
             "ClusterRole": f"{RBAC}/clusterroles", "ClusterRoleBinding": f"{RBAC}/clusterrolebindings",
             "Role": f"{RBAC}/namespaces/{NAMESPACE}/roles",
             "RoleBinding": f"{RBAC}/namespaces/{NAMESPACE}/rolebindings"}  # fmt: skip
    bed.admin.post(paths[manifest["kind"]], manifest)
    if manifest["kind"] == "ClusterRole":
        bed.roles[manifest["metadata"]["name"]] = manifest


# --- the operator --------------------------------------------------------------------------------------------------


@dataclass
class Operator:
    bed: Bed
    log: Log
    process: subprocess.Popen[bytes]

    def alive(self) -> bool:
        return self.process.poll() is None


@contextmanager
def operator(bed: Bed, *options: str) -> Iterator[Operator]:
    log = bed.folder / f"operator-{time.monotonic_ns()}.log"
    argv = [sys.executable, "-m", "fimbria.operator", "--kubeconfig", str(bed.kubeconfig("fimbria-operator"))]
    argv += ["--ipv4-pool", "10.200.0.0/23", "--ipv4-mask", "24", "--collect-interval", "1", "--identity-grace", "1"]
    argv += ["--endpoint-slices", *(() if ALONE in options else ("--leader-elect",))]
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    with log.open("wb") as output:
        process = subprocess.Popen([*argv, *options], stdout=output, stderr=output, env=env,
                                   preexec_fn=realserver.die_with_parent)  # fmt: skip
    try:
        yield Operator(bed, Log(log), process)
        assert process.poll() is None, f"the operator ended with {process.poll()}:\n{log.read_text()[-3000:]}"
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def crds(bed: Bed) -> None:
    for path in sorted((ROOT / "src/fimbria/crds").glob("*.yaml")):
        body = yaml.safe_load(path.read_text())
        bed.admin.post("/apis/apiextensions.k8s.io/v1/customresourcedefinitions", body)
        name = body["metadata"]["name"]
        until(name, lambda name=name: _established(bed, name))  # type: ignore[misc]


def _established(bed: Bed, name: str) -> bool:
    found = bed.admin.get(f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
    conditions = found.get("status", {}).get("conditions") or []
    return any(c["type"] == "Established" and c["status"] == "True" for c in conditions)


def cilium(kind: str, name: str, **fields: Any) -> dict[str, Any]:
    return {"apiVersion": "cilium.io/v2", "kind": kind, "metadata": {"name": name}, **fields}


def policy(name: str, **spec: Any) -> dict[str, Any]:
    return cilium("CiliumNetworkPolicy", name, spec={"endpointSelector": {}, **spec})


def judged(bed: Bed, name: str) -> tuple[str, str]:
    found = bed.admin.get(f"{BASE}/namespaces/default/ciliumnetworkpolicies/{name}")
    conditions = [c for c in found.get("status", {}).get("conditions", []) if c["type"] == "Valid"]
    return (conditions[0]["status"], conditions[0].get("message", "")) if conditions else ("", "")


def works(bed: Bed) -> None:
    """The operator does its work: a new policy is judged."""
    name = f"probe{time.monotonic_ns()}"
    bed.admin.post(f"{BASE}/namespaces/default/ciliumnetworkpolicies", policy(name, ingress=[{}]))
    until("a policy is judged", lambda: judged(bed, name)[0] == "True")
    bed.admin.delete(f"{BASE}/namespaces/default/ciliumnetworkpolicies/{name}")


class Work:
    """Something for every right of the operator: objects that make it use them, anew each time."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed

    def make(self) -> None:
        mark = str(time.monotonic_ns())
        post = self.bed.admin.post
        post("/api/v1/nodes", {"metadata": {"name": f"n{mark}"}})
        post(f"{BASE}/ciliumnodes", cilium("CiliumNode", f"n{mark}", spec={}))
        post(f"{BASE}/ciliumnodes", cilium("CiliumNode", f"gone{mark}", spec={}))
        post(f"{BASE}/namespaces/default/ciliumendpoints", cilium("CiliumEndpoint", f"gone{mark}"))
        # A namespace of its own makes a slice of its own.
        post("/api/v1/namespaces", {"metadata": {"name": f"ns{mark}"}})
        networking = {"addressing": [{"ipv4": "10.200.9.9"}], "node": "192.0.2.9"}
        status = {"id": 1, "identity": {"id": 4711}, "networking": networking}
        post(f"{BASE}/namespaces/ns{mark}/ciliumendpoints", cilium("CiliumEndpoint", f"in{mark}", status=status))
        number = 1000 + int(mark) % 60000
        labels = {"k8s:app": mark}
        post(f"{BASE}/ciliumidentities", cilium("CiliumIdentity", str(number), **{"security-labels": labels}))
        post(f"{BASE}/namespaces/default/ciliumnetworkpolicies", policy(f"p{mark}", ingress=[{}]))
        peer = {"ipBlock": {"cidr": "10.0.0.0/8"}}
        port = {"protocol": "SCTP", "port": "http"}
        spec = {"podSelector": {}, "ingress": [{"from": [peer], "ports": [port]}]}
        path = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"
        post(path, {"metadata": {"name": f"p{mark}"}, "spec": spec})

    def anew(self) -> None:
        self.clear()
        self.make()

    def clear(self) -> None:
        for path in (f"{BASE}/ciliumnodes", "/api/v1/nodes", f"{BASE}/ciliumidentities",
                     f"{BASE}/namespaces/default/ciliumendpoints", f"{BASE}/namespaces/default/ciliumnetworkpolicies",
                     "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies"):  # fmt: skip
            self.bed.admin.call("DELETE", path)


VERBS = {"POST": "create", "PATCH": "patch", "PUT": "update", "DELETE": "delete"}


def used(asked: list[str]) -> set[tuple[str, str, str]]:
    """The rights that requests needed: group, resource and verb."""
    found = set()
    for line in asked:
        method, _, target = line.partition(" ")
        path, _, query = target.partition("?")
        parts = [*path.strip("/").split("/"), ""]
        group, rest = (
            ("", parts[2:]) if parts[0] == "api" else (parts[1], parts[3:]) if parts[0] == "apis" else ("", [])
        )
        rest = [part for part in rest if part]
        if rest[:1] == ["namespaces"] and len(rest) > 2:
            rest = rest[2:]
        if not rest:
            continue
        resource = "/".join([rest[0], *rest[2:3]])
        verb = VERBS.get(method) or ("watch" if "watch=true" in query else "get" if len(rest) > 1 else "list")
        found.add((group, resource, verb))
    return found


@contextmanager
def provoked(bed: Bed, plural: str, verb: str) -> Iterator[None]:
    """Watches begin again, for `list` from a list: rights are only looked at then."""
    with ExitStack() as stack:
        if verb == "list":
            stack.enter_context(bed.proxy.fault(rf"^GET \S*/{plural}\?.*watch=true", status=410))
        if verb in ("list", "watch"):
            bed.proxy.cut()
        yield


def lacking(bed: Bed, role: str, needed: list[tuple[str, str, str]], log: Log, work: Callable[[], Any],
            works: Callable[[], Any]) -> None:  # fmt: skip
    """One right after the other is missing for a while: it is named, the rest goes on, and soon all is well again."""
    problems = []
    for group, plural, verb in needed:
        log.mark()
        try:
            with bed.without(role, group, plural, verb), provoked(bed, plural, verb):
                work()
                resource = plural.partition("/")[0]
                log.line(f'(WARNING|ERROR).* cannot {verb} resource "{resource}')
            works()
        except AssertionError as error:
            problems.append(f"{verb} {plural}.{group}: {str(error)[:1500]}")
    assert not problems, "\n\n".join(problems)


def test_operator_without_one_of_its_rights(bed: Bed, crds: None) -> None:
    work, role = Work(bed), "fimbria-operator"
    bed.proxy.asked.clear()
    with operator(bed, ALONE) as running:
        work.make()
        works(bed)
        time.sleep(4.0)
        every = set(rights(bed.roles[role]))
        until("most are used", lambda: len(used(bed.proxy.asked) & every) > 12)
        assert " forbidden" not in running.log.text(), running.log.text()[-3000:]
        needed = sorted(used(bed.proxy.asked) & every)
        print("not needed here:", sorted(every - set(needed)))
        try:
            lacking(bed, role, needed, running.log, work.anew, lambda: works(bed))
        finally:
            work.clear()


def test_operator_without_its_lease(bed: Bed, crds: None) -> None:
    with operator(bed) as first:
        works(bed)
        assert first.alive()
    path = f"{RBAC}/namespaces/{NAMESPACE}/roles/fimbria-operator"
    whole = bed.admin.get(path)
    bed.admin.patch(path, {"rules": [r for r in whole["rules"] if "leases" not in r["resources"]]})
    try:
        lease = ("fimbria-operator", "coordination.k8s.io", "leases", "get", NAMESPACE)
        until("the server knows", lambda: not bed.may(*lease))
        with operator(bed) as lacking:
            line = lacking.log.line('cannot get resource "leases"')
            assert "WARNING" in line
            bed.admin.patch(path, {"rules": whole["rules"]})
            works(bed)
            assert lacking.log.text().count("cannot get resource") == 1, "said once"
    finally:
        bed.admin.patch(path, {"rules": whole["rules"]})


def test_operator_and_a_webhook_that_refuses(bed: Bed, crds: None) -> None:
    def refuse(request: dict[str, Any]) -> tuple[bool, str, list[Any]]:
        return request["name"] != "unlucky", "not on a Monday", []

    path = f"{BASE}/namespaces/default/ciliumnetworkpolicies"
    bed.admin.post(path, policy("lucky", ingress=[{}]))

    def provoke() -> None:
        bed.admin.patch(f"{path}/lucky/status", {"status": {}}, dryRun="All")

    with operator(bed, ALONE) as running:
        works(bed)
        kind, plural = "ValidatingWebhookConfiguration", "ciliumnetworkpolicies/status"
        with bed.webhook(refuse, kind, plural, "UPDATE", provoke=provoke):
            bed.admin.post(path, policy("unlucky", ingress=[{}]))
            line = running.log.line("unlucky.*not on a Monday")
            assert "fim-bad-input.test.invalid" in line, line
            works(bed)
        until("the status is written at last", lambda: judged(bed, "unlucky")[0] == "True")
        for name in ("lucky", "unlucky"):
            bed.admin.delete(f"{path}/{name}")


@pytest.mark.parametrize(
    "spec",
    [
        {"ingress": [{"fromEndpoint": [{"matchLabels": {"a": "b"}}]}]},
        {"ingress": [{"toPorts": [{"ports": [{"port": "99999", "protocol": "TCP"}]}]}]},
        {"egress": [{"toCIDR": ["10.0.0.0/40"]}]},
        {"ingress": [{"fromEndpoints": [{"matchExpressions": [{"key": "a", "operator": "Sometimes"}]}]}]},
    ],
    ids=["typo", "port", "cidr", "operator"],
)
def test_objects_that_the_schema_lets_pass(bed: Bed, crds: None, spec: dict[str, Any]) -> None:
    """What can't be understood is refused by a condition that says why; its neighbours are judged as ever."""
    path = f"{BASE}/namespaces/default/ciliumnetworkpolicies"
    answer = bed.admin.call("POST", path, policy("strange", **spec))
    if answer.code == 422:
        return  # the schema already refuses it, naming the field
    with operator(bed, ALONE):
        assert answer.code == 201, answer.body
        status, why = until("it is judged", lambda: judged(bed, "strange") if judged(bed, "strange")[0] else None)
        found = bed.admin.get(f"{path}/strange")
        kept = json.dumps(found["spec"]) == json.dumps(policy("strange", **spec)["spec"])
        assert status == "False" or not kept, (status, why, found["spec"])
        works(bed)
    bed.admin.delete(f"{path}/strange")


def test_huge_objects(bed: Bed, crds: None) -> None:
    """A megabyte of policy, as large as etcd takes."""
    rules = [{"fromCIDR": [f"10.{n >> 8}.{n & 255}.{m}/32" for m in range(40)]} for n in range(1000)]
    path = f"{BASE}/namespaces/default/ciliumnetworkpolicies"
    with operator(bed, ALONE) as running:
        bed.admin.post(path, policy("huge", ingress=rules))
        until("it is judged", lambda: judged(bed, "huge")[0])
        works(bed)
        assert running.alive()
    bed.admin.delete(f"{path}/huge")


def test_conflicting_updates(bed: Bed, crds: None) -> None:
    """Somebody writes what the operator writes, all the time: both get on; the operator's word stands."""
    path = f"{BASE}/ciliumnodes/contested"
    with operator(bed, ALONE) as running:
        bed.admin.post("/api/v1/nodes", {"metadata": {"name": "contested"}})
        bed.admin.post(f"{BASE}/ciliumnodes", cilium("CiliumNode", "contested", spec={}))
        blocks = until("it has a block", lambda: bed.admin.get(path)["spec"].get("ipam", {}).get("podCIDRs"))
        for n in range(30):
            bed.admin.patch(path, {"spec": {"ipam": {"podCIDRs": []}}, "metadata": {"labels": {"n": str(n)}}})
        again = until("it has its block again", lambda: bed.admin.get(path)["spec"].get("ipam", {}).get("podCIDRs"))
        assert len(again) == len(blocks)
        assert running.alive()
        works(bed)
    for one in (path, "/api/v1/nodes/contested"):
        bed.admin.delete(one)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_server_that_fails_now_and_then(bed: Bed, crds: None, status: int) -> None:
    with operator(bed, ALONE) as running:
        works(bed)
        with bed.proxy.fault(
            "^(PATCH|POST) /apis/cilium", status=status, retry_after="1" if status == 429 else ""
        ) as fault:
            name = f"late{status}"
            bed.admin.post(f"{BASE}/namespaces/default/ciliumnetworkpolicies", policy(name, ingress=[{}]))
            until("it is asked", lambda: fault.hits > 1)
            assert judged(bed, name) == ("", "")
            if status != 429:
                running.log.line(f"{name} is not up to date.*{status}")
        until("it is written", lambda: judged(bed, name)[0] == "True")
        bed.admin.delete(f"{BASE}/namespaces/default/ciliumnetworkpolicies/{name}")


def test_token_authority_and_clock(bed: Bed, crds: None) -> None:
    """Credentials are rotated under a running process: by files, as kubelet does."""
    with operator(bed, ALONE) as running:
        works(bed)
        bed.revoke("fimbria-operator")
        bed.renew("fimbria-operator")
        bed.proxy.cut()
        works(bed)
        # Another authority, which we learn of a moment later than the server shows it.
        first, second = bed.pair, faulty.Pair.make(bed.folder, "second")
        running.log.mark()
        bed.proxy.present(second)
        running.log.line("certificate isn't accepted")
        bed.authority.write_bytes(second.cert.read_bytes())
        works(bed)
        # A certificate of the future: somebody's clock is wrong.
        early = faulty.Pair.make(bed.folder, "early", "20990101000000Z", "20990201000000Z")
        bed.authority.write_bytes(second.cert.read_bytes() + early.cert.read_bytes())
        running.log.mark()
        bed.proxy.present(early)
        assert "clock" in running.log.line("not yet valid", 60.0)
        bed.proxy.present(first)
        bed.authority.write_bytes(first.cert.read_bytes())
        works(bed)


# --- the agent -----------------------------------------------------------------------------------------------------


@dataclass
class Node:
    """A node of a lab whose agent asks as its service account, through the proxy."""

    bed: Bed
    lab: Lab
    log: Log

    def restart(self) -> None:
        self.lab.kill(AGENT)
        self.log.mark()
        self.lab.restart(AGENT)

    def add(self, name: str, namespace: str = "default", **labels: str) -> None:
        """A pod that sleeps."""
        container = {"name": "main", "image": "fimbria/labtool", "command": ["labtool", "sleep"]}
        meta = {"name": name, "namespace": namespace, "labels": labels or {"app": name}}
        spec = {"nodeName": "node1", "terminationGracePeriodSeconds": 0, "containers": [container]}
        self.bed.admin.post(f"/api/v1/namespaces/{namespace}/pods", {"metadata": meta, "spec": spec})

    def remove(self, name: str, namespace: str = "default") -> None:
        self.bed.admin.call("DELETE", f"/api/v1/namespaces/{namespace}/pods/{name}", gracePeriodSeconds=0)

    def remove_held(self, name: str) -> None:
        """Its report is there until `release`: else the lab's collector may be faster than the agent to remove it."""
        self._finalizers(name, ["test.invalid/held"])
        self.remove(name)

    def release(self, name: str) -> None:
        self._finalizers(name, None)
        until(f"the report of {name} is gone", lambda: self.reported(name) is None)

    def _finalizers(self, name: str, wanted: list[str] | None) -> None:
        path = f"{BASE}/namespaces/default/ciliumendpoints/{name}"
        answer = self.bed.admin.call("PATCH", path, {"metadata": {"finalizers": wanted}}, kind=kube.MERGE)
        assert answer.code in (200, 404), answer.body

    def reported(self, name: str, namespace: str = "default") -> dict[str, Any] | None:
        answer = self.bed.admin.call("GET", f"{BASE}/namespaces/{namespace}/ciliumendpoints/{name}")
        return answer.body if answer.code == 200 else None

    def works(self, seconds: float = SOON) -> None:
        """A new pod is made, identified and reported, and its end too."""
        name = f"probe{time.monotonic_ns()}"
        self.add(name)
        until(f"{name} is reported", lambda: self.reported(name), seconds)
        self.remove(name)
        until(f"{name} is gone", lambda: self.reported(name) is None, seconds)

    def told(self, pod: str, reason: str, namespace: str = "default") -> str:
        """The message of an event about a pod."""
        return until(f"an event {reason} about {pod}", lambda: next(
            (str(e["message"]) for e in self.bed.events(namespace, pod) if e["reason"] == reason), ""))  # fmt: skip


@pytest.fixture(scope="module")
def node(bed: Bed, crds: None) -> Iterator[Node]:
    name = f"fimh5{os.getpid()}"
    document = yaml.safe_load(bed.kubeconfig("fimbria").read_text())
    agents_token = document["users"][0]["user"]["tokenFile"]
    document["users"][0]["user"] = {"token": bed.admin.token}
    admins = bed.folder / "admin.kubeconfig"
    admins.write_text(yaml.safe_dump(document))
    try:
        cluster.up(LabSpec(name=name, nodes=1, kubeconfig=str(admins), controllers=True))
        lab = Lab(name)
        settings = yaml.safe_load(lab.paths.kubeconfig.read_text())
        settings["users"][0]["user"] = {"tokenFile": agents_token}
        lab.paths.kubeconfig.write_text(yaml.safe_dump(settings))
        made = Node(bed, lab, Log(components.log_path(lab.paths, AGENT)))
        made.restart()
        made.works()
        yield made
    finally:
        cluster.down(name)


def test_agent_without_one_of_its_rights(node: Node) -> None:
    bed, role = node.bed, "fimbria"
    bed.proxy.asked.clear()
    node.restart()
    node.works()
    node.add("leaves")
    until("it is reported", lambda: node.reported("leaves"))
    node.remove_held("leaves")
    until("the agent removes it", lambda: ("cilium.io", "ciliumendpoints", "delete") in used(bed.proxy.asked))
    node.release("leaves")
    assert " cannot " not in node.log.text(), node.log.text()[-3000:]
    needed = used(bed.proxy.asked) & set(rights(bed.roles[role]))
    print("not needed here:", sorted(set(rights(bed.roles[role])) - needed))
    assert len(needed) > 18, needed
    pods: list[str] = []
    held: list[str] = []

    def work() -> None:
        for old in pods:
            node.remove_held(old)
        held[:], pods[:] = pods, [f"lacking{time.monotonic_ns()}"]
        node.add(pods[0])

    def all_works() -> None:
        node.works()
        for name in held:
            node.release(name)
        for name in pods:  # what isn't reported yet is nothing that the next one could remove
            until(f"{name} is reported", lambda name=name: node.reported(name))  # type: ignore[misc]

    # Asked once in an agent's life, or by a race with the watch: not to be had at will.
    once = {("", "nodes", "get"), ("", "pods", "get"), ("", "namespaces", "get")} | {
        ("cilium.io", "ciliumnodes", verb) for verb in ("get", "create", "patch")
    } | {("cilium.io", "ciliumidentities", "get")}  # fmt: skip
    lacking(bed, role, sorted(needed - once), node.log, work, all_works)


def make_a_report(node: Node) -> None:
    """That is judged and not kept."""
    path = f"{BASE}/namespaces/default/ciliumendpoints"
    node.bed.admin.post(path, cilium("CiliumEndpoint", "anybody"), dryRun="All")


def test_webhook_that_refuses_reports(node: Node) -> None:
    def refuse(request: dict[str, Any]) -> tuple[bool, str, list[Any]]:
        return not request["name"].startswith("unlucky"), "not on a Monday", []

    node.log.mark()
    kind, provoke = "ValidatingWebhookConfiguration", partial(make_a_report, node)
    with node.bed.webhook(refuse, kind, "ciliumendpoints", "CREATE", "UPDATE", provoke=provoke):
        for n in range(12):  # more than the publisher has workers
            node.add(f"unlucky{n}")
        assert "fim-bad-input.test.invalid" in node.log.line("unlucky3 is not up to date.*not on a Monday")
        assert "not on a Monday" in node.told("unlucky3", "NotReported")
        node.works()
        time.sleep(3.0)
        assert node.log.text().count("unlucky3 is not up to date") == 1, "said once"
    for n in range(12):
        until(f"unlucky{n} is reported", lambda n=n: node.reported(f"unlucky{n}"))  # type: ignore[misc]
        node.remove(f"unlucky{n}")


def test_webhook_that_changes_reports(node: Node) -> None:
    def change(request: dict[str, Any]) -> tuple[bool, str, list[Any]]:
        if not request["name"].startswith("changed"):
            return True, "", []
        return True, "", [{"op": "replace", "path": "/status/identity/id", "value": 4711}]

    kind, provoke = "MutatingWebhookConfiguration", partial(make_a_report, node)
    with node.bed.webhook(change, kind, "ciliumendpoints", "CREATE", provoke=provoke):
        node.log.mark()
        node.add("changed")
        node.log.line("ERROR.*changed: it was changed on its way.*4711 is stored|ERROR.*changed: it was changed.*4711")
        assert "4711" in node.told("changed", "ReportChanged")
        node.works()
    node.remove("changed")


def test_quota_full(node: Node) -> None:
    admin, path = node.bed.admin, "/api/v1/namespaces/full/resourcequotas/none"
    admin.post("/api/v1/namespaces", {"metadata": {"name": "full"}})
    hard = {"count/ciliumendpoints.cilium.io": "0"}
    admin.post(path.rpartition("/")[0], {"metadata": {"name": "none"}, "spec": {"hard": hard}})
    admin.patch(f"{path}/status", {"status": {"hard": hard, "used": hard}})  # what a controller-manager would do
    node.log.mark()
    node.add("squeezed", "full")
    assert "exceeded quota: none" in node.log.line("full/squeezed is not up to date")
    assert "exceeded quota" in node.told("squeezed", "NotReported", "full")
    node.works()
    admin.delete(path)
    until("it is reported", lambda: node.reported("squeezed", "full"))
    node.remove("squeezed", "full")


def test_namespace_that_stays_terminating(node: Node) -> None:
    admin = node.bed.admin
    admin.post("/api/v1/namespaces", {"metadata": {"name": "stuck"}})
    node.add("late", "stuck")
    until("it is reported", lambda: node.reported("late", "stuck"))
    admin.delete("/api/v1/namespaces/stuck")  # nobody here empties it: it stays
    admin.delete(f"{BASE}/namespaces/stuck/ciliumendpoints/late")
    node.log.mark()
    admin.patch("/api/v1/namespaces/stuck/pods/late", {"metadata": {"labels": {"app": "other"}}})
    node.works()
    time.sleep(3.0)
    assert "stuck/late" not in node.log.text(), "its end is no news"
    assert not node.reported("late", "stuck")
    node.remove("late", "stuck")


@pytest.mark.parametrize(
    "fault",
    [{"status": 429, "retry_after": "1"}, {"status": 500}, {"status": 503}, {"delay": 3.0}],
    ids=["busy", "failing", "unavailable", "slow"],
)
def test_server_in_trouble(node: Node, fault: dict[str, Any]) -> None:
    name = f"trouble{time.monotonic_ns()}"
    with node.bed.proxy.fault(r"^(GET|POST|PATCH) (?!.*watch=true)", **fault) as trouble:
        node.add(name)
        until("it is felt", lambda: trouble.hits > 3)
        time.sleep(5.0)
    until(f"{name} is reported", lambda: node.reported(name), 60.0)
    node.remove(name)
    node.works()


def test_objects_of_others_that_cannot_be_used(node: Node) -> None:
    """Each is named in the log; whoever depends on nothing of it goes on."""
    admin = node.bed.admin
    networking = {"addressing": [{"ipv4": "10.244.99.9"}], "node": "172.31.9.9"}
    bad: tuple[tuple[str, dict[str, Any], str], ...] = (
        (f"{BASE}/namespaces/default/ciliumendpoints",
         cilium("CiliumEndpoint", "impostor", status={"identity": {"id": 1}, "networking": networking}),
         "1 is no pod's identity"),
        (f"{BASE}/ciliumidentities", cilium("CiliumIdentity", "2", **{"security-labels": {"k8s:app": "x"}}),
         "no identity's"),
        (f"{BASE}/ciliumnodes", cilium("CiliumNode", "greedy", spec={
            "addresses": [{"type": "InternalIP", "ip": "172.31.9.9"}], "ipam": {"podCIDRs": ["0.0.0.0/0"]}}),
         "contains the node's own address"),
        (
            f"{BASE}/namespaces/default/ciliumnetworkpolicies",
            policy("vast", egress=[{"toCIDR": ["10.0.0.0/40"]}]),
            "10.0.0.0/40",
        ),
    )  # fmt: skip
    node.log.mark()
    operators = Log(components.log_path(node.lab.paths, "control/operator"))
    operators.mark()
    for path, body, said in bad:
        answer = admin.call("POST", path, body)
        name = body["metadata"]["name"]
        if answer.code == 422:
            continue  # the schema refuses it already
        assert answer.code == 201, answer.body
        pattern = re.compile(f"(WARNING|ERROR).*({name}.*{said}|{said}.*{name})")
        logs = (node.log, operators)  # whoever follows the kind
        until(f"{name} is named", lambda p=pattern, o=logs: any(p.search(one.text()) for one in o))  # type: ignore[misc]
    events = until("an event about it", lambda: node.bed.events("default", "impostor"))
    assert events[0]["reason"] == "Unusable", events
    node.works()
    for path, body, _ in bad:
        admin.call("DELETE", f"{path}/{body['metadata']['name']}")


def test_agent_whose_token_is_revoked(node: Node) -> None:
    node.bed.revoke("fimbria")
    node.bed.renew("fimbria")
    node.bed.proxy.cut()
    node.works()
