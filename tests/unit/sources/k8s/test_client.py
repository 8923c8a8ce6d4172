"""The client: what goes over the wire, and what each kind of answer becomes."""

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from scripted_api import Pauses, Scripted, Stream, answer, event, fails, listing, pod, status

from fimbria.sources.k8s import errors
from fimbria.sources.k8s.client import ApiClient
from fimbria.sources.k8s.config import ClusterConfig, Token
from fimbria.sources.k8s.resources import CILIUM_IDENTITIES, CILIUM_NODES, NODES, PODS, SERVICES
from fimbria.sources.k8s.types.cilium import CiliumIdentity, CiliumNode, CiliumNodeSpec, NodeIPAMSpec
from fimbria.sources.k8s.types.meta import ObjectMeta


async def test_get_decodes_and_says_who_asks(api: Scripted, client: ApiClient) -> None:
    api.on("get", answer(pod("a", 5)))
    got = await client.get(PODS, "a", "ns")
    assert (got.metadata.name, got.spec.node_name) == ("a", "n1")
    (seen,) = api.seen
    assert seen.path == "/api/v1/namespaces/ns/pods/a"
    assert seen.headers["User-Agent"].startswith("fimbria-test/")
    assert "Authorization" not in seen.headers


async def test_list_collects_pages(api: Scripted, client: ApiClient) -> None:
    api.on("list", listing([pod("a", 1)], 7, "t"), listing([pod("b", 2)], 7))
    got = await client.list(PODS, "ns", labels="a in (b,c)", limit=1)
    assert [item.metadata.name for item in got.items] == ["a", "b"]
    assert got.resource_version == "7"
    assert [seen.query["labelSelector"] for seen in api.seen] == ["a in (b,c)"] * 2


async def test_null_lists_are_empty(api: Scripted, client: ApiClient) -> None:
    api.on("list", answer({"metadata": {"resourceVersion": "1"}, "items": None}))
    assert (await client.list(PODS)).items == ()


async def test_create_fills_in_the_kind_and_leaves_out_defaults(api: Scripted, client: ApiClient) -> None:
    identity = CiliumIdentity(metadata=ObjectMeta(name="1234"), security_labels={"k8s:app": "x"})
    api.on("post", answer({"metadata": {"name": "1234"}}, 201))
    await client.create(CILIUM_IDENTITIES, identity)
    (seen,) = api.seen
    assert seen.path == "/apis/cilium.io/v2/ciliumidentities"
    assert seen.json == {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumIdentity",
        "metadata": {"name": "1234"},
        "security-labels": {"k8s:app": "x"},
    }


async def test_replace_sends_the_version(api: Scripted, client: ApiClient) -> None:
    node = CiliumNode(
        metadata=ObjectMeta(name="n", resource_version="5"),
        spec=CiliumNodeSpec(ipam=NodeIPAMSpec(pod_cidrs=("10.0.0.0/24",))),
    )
    api.on("put", answer({"metadata": {"name": "n"}}))
    await client.replace(CILIUM_NODES, "n", node)
    assert api.seen[0].json["metadata"]["resourceVersion"] == "5"
    assert api.seen[0].json["spec"] == {"ipam": {"podCIDRs": ["10.0.0.0/24"]}}


@pytest.mark.parametrize(
    ("kind", "content_type"),
    [
        ("merge", "application/merge-patch+json"),
        ("json", "application/json-patch+json"),
        ("strategic", "application/strategic-merge-patch+json"),
        ("apply", "application/apply-patch+yaml"),
    ],
)
async def test_patch_kinds(api: Scripted, client: ApiClient, kind: Any, content_type: str) -> None:
    api.on("patch", answer({"metadata": {"name": "n"}}))
    patch: Any = [{"op": "remove", "path": "/spec"}] if kind == "json" else {"metadata": {"labels": {"a": None}}}
    await client.patch(NODES, "n", patch, kind=kind)
    (seen,) = api.seen
    assert seen.headers["Content-Type"] == content_type
    assert seen.query["fieldManager"] == "fimbria-test"
    if kind == "apply":
        assert seen.query["force"] == "false"
        assert seen.json == {"apiVersion": "v1", "kind": "Node", **patch}
    else:
        assert seen.json == patch


async def test_patch_status_goes_to_the_subresource(api: Scripted, client: ApiClient) -> None:
    api.on("patch", answer({"metadata": {"name": "n"}}))
    await client.patch_status(CILIUM_NODES, "n", {"ipam": {"operator-status": {"error": "pool empty"}}})
    assert api.seen[0].path == "/apis/cilium.io/v2/ciliumnodes/n/status"
    assert api.seen[0].json == {"status": {"ipam": {"operator-status": {"error": "pool empty"}}}}


async def test_delete_with_preconditions(api: Scripted, client: ApiClient) -> None:
    api.on("delete", answer(status(200, "")), fails(404, "NotFound"), fails(404, "NotFound"))
    await client.delete(PODS, "a", "ns", uid="u1", resource_version="7", propagation="Background", grace_seconds=0)
    assert api.seen[0].json == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "preconditions": {"uid": "u1", "resourceVersion": "7"},
        "propagationPolicy": "Background",
        "gracePeriodSeconds": 0,
    }
    await client.delete(PODS, "a", "ns", missing_ok=True)
    with pytest.raises(errors.NotFound):
        await client.delete(PODS, "a", "ns")


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (401, "Unauthorized", errors.Unauthorized),
        (403, "Forbidden", errors.Forbidden),
        (404, "NotFound", errors.NotFound),
        (409, "Conflict", errors.Conflict),
        (409, "AlreadyExists", errors.AlreadyExists),
        (410, "Expired", errors.Gone),
        (422, "Invalid", errors.Invalid),
        (500, "InternalError", errors.ApiError),
    ],
)
async def test_errors_have_a_type_and_name_the_object(
    api: Scripted, client: ApiClient, code: int, reason: str, kind: type[errors.ApiError]
) -> None:
    api.on("get", fails(code, reason, "because"))
    with pytest.raises(errors.ApiError) as caught:
        await client.get(SERVICES, "web", "shop")
    assert type(caught.value) is kind
    assert str(caught.value) == f'get Service "shop/web": {code} {reason}: because'
    assert (caught.value.status, caught.value.reason) == (code, reason)


async def test_causes_are_kept(api: Scripted, client: ApiClient) -> None:
    details = {"causes": [{"reason": "FieldValueInvalid", "field": "spec.x", "message": "no"}]}
    api.on("post", answer(status(422, "Invalid", "bad", details=details), 422))
    with pytest.raises(errors.Invalid) as caught:
        await client.create(PODS, {"metadata": {"name": "a"}}, "ns")
    assert caught.value.details is not None
    assert caught.value.details.causes is not None
    assert caught.value.details.causes[0].field == "spec.x"


async def test_words_of_a_proxy_in_between_are_shown(api: Scripted, client: ApiClient) -> None:
    async def gateway(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=502, text="upstream is gone\n")

    api.on("get", gateway)
    with pytest.raises(errors.ApiError, match="502: upstream is gone"):
        await client.get(NODES, "n")


async def test_busy_is_tried_again_for_writes_as_well(api: Scripted, client: ApiClient, pauses: Pauses) -> None:
    api.on("post", fails(429, "TooManyRequests", Retry_After="3"), fails(503, "", Retry_After="1"))
    api.on("post", fails(429, "TooManyRequests"), answer({"metadata": {"name": "a"}}, 201))
    await client.create(PODS, {"metadata": {"name": "a"}}, "ns")
    assert pauses.asked == [3.0, 1.0, 1.0]


async def test_patience_ends(api: Scripted, client: ApiClient, pauses: Pauses) -> None:
    api.on("get", *(fails(429, "TooManyRequests", Retry_After="1") for _ in range(6)))
    with pytest.raises(errors.TooMany) as caught:
        await client.get(NODES, "n")
    assert caught.value.retry_after == 1.0
    assert len(pauses.asked) == 5
    api.on("get", fails(429, "TooManyRequests", Retry_After="3600"))
    with pytest.raises(errors.TooMany):
        await client.get(NODES, "n")
    assert len(pauses.asked) == 5


async def test_plain_503_is_the_callers(api: Scripted, client: ApiClient) -> None:
    api.on("get", fails(503, "ServiceUnavailable"))
    with pytest.raises(errors.ApiError, match="503"):
        await client.get(NODES, "n")
    assert len(api.seen) == 1


async def test_refused_token_is_read_again_once(api: Scripted, tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text("old")
    token = Token(path=path)
    token.get()
    path.write_text("new")
    api.on("get", fails(401, "Unauthorized"), answer({"metadata": {"name": "n"}}))
    api.on("get", fails(401, "Unauthorized"), fails(401, "Unauthorized"))
    async with ApiClient(ClusterConfig(api.url, token=token), component="test") as client:
        await client.get(NODES, "n")
        with pytest.raises(errors.Unauthorized):
            await client.get(NODES, "n")
    assert [seen.headers["Authorization"] for seen in api.seen][:2] == ["Bearer old", "Bearer new"]
    assert len(api.seen) == 4


async def test_rate_limit_spreads_requests(api: Scripted) -> None:
    pauses = Pauses()
    api.on("get", *(answer({"metadata": {"name": "n"}}) for _ in range(4)))
    config = ClusterConfig(api.url)
    async with ApiClient(config, component="t", rate=2.0, burst=2, sleep=pauses, clock=lambda: 0.0) as client:
        for _ in range(4):
            await client.get(NODES, "n")
    assert pauses.asked == [0.5, 1.0]


async def test_further_pages_do_not_wait(api: Scripted) -> None:
    pauses = Pauses()
    api.on("list", *(listing([], 1, "more") for _ in range(5)), listing([], 1), listing([], 1))
    config = ClusterConfig(api.url)
    async with ApiClient(config, component="t", rate=1.0, burst=1, sleep=pauses, clock=lambda: 0.0) as client:
        await client.list(PODS)
        assert pauses.asked == []
        await client.list(PODS)
        assert pauses.asked == [1.0]


async def test_nobody_listens() -> None:
    async with ApiClient(ClusterConfig("http://127.0.0.1:1"), component="test") as client:
        with pytest.raises(errors.Unavailable, match=r'get Node "n": no answer: .*127\.0\.0\.1'):
            await client.get(NODES, "n")


async def test_slow_answer_times_out(api: Scripted) -> None:
    gate = asyncio.Event()

    async def slow(_request: web.Request) -> web.StreamResponse:
        await gate.wait()
        return web.json_response({})

    api.on("get", slow).on("watch", slow)
    async with ApiClient(ClusterConfig(api.url), component="test", timeout=0.1) as client:
        with pytest.raises(errors.Unavailable, match='get Node "n": no answer: timed out'):
            await client.get(NODES, "n")
        with pytest.raises(errors.Unavailable, match="watch nodes: no answer: timed out"):
            async with client.watch(NODES, resource_version="1"):
                pass
    gate.set()


async def test_answers_of_another_shape(api: Scripted, client: ApiClient) -> None:
    api.on("get", answer({"metadata": 5}), answer([]))
    for _ in range(2):
        with pytest.raises(errors.BadAnswer, match='get Node "n": 200: the answer doesn\'t decode'):
            await client.get(NODES, "n")


async def test_redirect_is_not_followed_with_our_token(api: Scripted) -> None:
    async def elsewhere(_request: web.Request) -> web.StreamResponse:
        return web.Response(status=302, headers={"Location": f"{api.url}/other"})

    api.on("get", elsewhere)
    async with ApiClient(ClusterConfig(api.url, token=Token("secret")), component="test") as client:
        with pytest.raises(errors.ApiError, match="302"):
            await client.get(NODES, "n")
    assert len(api.seen) == 1


async def test_watch_refused_and_watch_read(api: Scripted, client: ApiClient) -> None:
    api.on("watch", fails(403, "Forbidden", "no"), Stream().send(event("ADDED", pod("a", 1))).end())
    with pytest.raises(errors.Forbidden, match="watch pods in ns: 403"):
        async with client.watch(PODS, "ns", resource_version="1"):
            pass
    async with client.watch(PODS, "ns", resource_version="1") as chunks:
        assert b"".join([chunk async for chunk in chunks]) == event("ADDED", pod("a", 1))


@pytest.mark.parametrize(
    ("namespace", "name", "message"),
    [("ns", "n", "cluster-scoped"), ("", "..", "no name"), ("", ".", "no name")],
)
def test_paths_refuse_nonsense(namespace: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NODES.path(namespace, name)


def test_paths_are_quoted() -> None:
    assert NODES.path(name="a/../b c") == "/api/v1/nodes/a%2F..%2Fb%20c"
    with pytest.raises(ValueError, match="without a namespace"):
        PODS.path(name="a")
    assert PODS.path() == "/api/v1/pods"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for the name `kubernetes`, and its key."""
    where = tmp_path_factory.mktemp("pki")
    cert, key = where / "c", where / "k"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", "/CN=kubernetes", "-addext", "subjectAltName=DNS:kubernetes", "-days", "2"]
    subprocess.run([*command, "-keyout", str(key), "-out", str(cert)], check=True, capture_output=True)
    return cert, key


async def test_client_certificate_over_tls(pair: tuple[Path, Path]) -> None:
    """Mutual TLS with a certificate that came as data, and a server name other than the address."""
    cert, key = pair
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=str(cert))
    server.load_cert_chain(cert, key)
    server.verify_mode = ssl.CERT_REQUIRED
    subjects: list[Any] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        subjects.append(request.transport.get_extra_info("peercert")["subject"])
        return web.json_response({"metadata": {"name": "n"}})

    app = web.Application()
    app.router.add_get("/{tail:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=server).start()
    url = f"https://127.0.0.1:{runner.addresses[0][1]}"
    tls = ssl.create_default_context(cafile=str(cert))
    tls.load_cert_chain(cert, key)
    try:
        async with ApiClient(ClusterConfig(url, tls, "kubernetes"), component="test") as client:
            await client.get(NODES, "n")
        async with ApiClient(ClusterConfig(url, tls), component="test") as client:
            with pytest.raises(errors.Unavailable, match="certificate isn't accepted"):
                await client.get(NODES, "n")
    finally:
        await runner.cleanup()
    assert subjects == [((("commonName", "kubernetes"),),)]
