"""What the informers' conversions say about Services."""

import logging
from typing import Any

import msgspec
import pytest

from fimbria.agent.sources import MAX_TOLD, Sources, vocabulary
from fimbria.sources.k8s.types import core
from fimbria.tables import Tables


def service(**annotations: str) -> core.Service:
    notes = {f"service.cilium.io/{name}": value for name, value in annotations.items()}
    metadata = {"namespace": "shop", "name": "web", "annotations": notes}
    spec = {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]}
    return msgspec.convert({"metadata": metadata, "spec": spec}, core.Service)


@pytest.fixture
def sources() -> Sources:
    client: Any = None
    return Sources(client, Tables(), "here", vocabulary("", "default"))


def test_a_warning_names_its_object_and_is_said_once(sources: Sources, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        row = sources._service(service(type="Everything"))
        sources.tables.services.upsert(row.key, row)
        sources._service(service(type="Everything"))
    assert [r.getMessage() for r in caplog.records] == [f"Service shop/web: {row.warnings[0]}"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        sources._service(service(type="Everything", node="a b"))
    assert ["service.cilium.io/node:" in r.getMessage() for r in caplog.records] == [True]


def test_one_object_says_a_few_things_at_most(sources: Sources, caplog: pytest.LogCaptureFixture) -> None:
    slice_ = {
        "metadata": {"namespace": "shop", "name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [f"nonsense{n}"]} for n in range(100)],
    }
    with caplog.at_level(logging.WARNING):
        row = sources._slice(msgspec.convert(slice_, core.EndpointSlice))
    assert row is not None
    assert len(row.warnings) == 100
    assert [r.getMessage()[:24] for r in caplog.records] == ["EndpointSlice shop/web-1"] * MAX_TOLD


@pytest.mark.parametrize(("node", "known"), [("here", True), ("elsewhere", False)])
async def test_only_pods_of_this_node_are_fetched(node: str, known: bool) -> None:
    """Nobody would tell that another node's pod is gone: its row would stay."""

    class Server:
        async def get(self, resource: Any, name: str, namespace: str | None = None) -> Any:
            if namespace is None:
                return msgspec.convert({"metadata": {"name": name}}, core.Namespace)
            made = {"metadata": {"namespace": namespace, "name": name, "uid": "1"}, "spec": {"nodeName": node}}
            return msgspec.convert(made, core.Pod)

    client: Any = Server()
    sources = Sources(client, Tables(), "here", vocabulary("", "default"))
    await sources.fetch_pod("shop", "web-0")
    assert (("shop", "web-0") in sources.tables.pods) == known
