"""Blocks that two nodes claim: nobody takes another one's routes along."""

from fimbria.agent.engine import DesiredRows, Engine, NumberBook
from fimbria.model.address import Prefix, pack
from fimbria.model.network import DeviceSet, Route
from fimbria.model.node import Node
from fimbria.tables import Tables

OVERLAY = 9
OWN, FAR = Prefix.parse("10.1.0.0/24"), Prefix.parse("10.2.0.0/24")


def test_a_claim_that_goes_takes_only_its_own() -> None:
    tables, rows = Tables(), DesiredRows()
    engine = Engine(tables, rows, NumberBook(), node="one", cluster="default", overlay=True)
    engine.set_devices(DeviceSet(7, bytes(6), OVERLAY, (2,), 1500, 1450))
    tables.nodes.upsert("one", Node("one", (pack("192.0.2.1"),), (), (OWN,)))
    tables.nodes.upsert("two", Node("two", (pack("192.0.2.2"),), (), (FAR,)))
    engine.step()
    before = dict(rows.routes.desired)
    assert before.keys() == {OWN, FAR}
    assert before[OWN] == Route(0)
    assert before[FAR].ifindex == OVERLAY
    for name in ("a-thief", "thief"):
        tables.nodes.upsert(name, Node(name, (pack("192.0.2.3"),), (), (OWN, FAR)))
        engine.step()
        assert rows.routes.desired == before
        tables.nodes.upsert(name, Node(name, (pack("192.0.2.3"),), (), ()))
        engine.step()
        assert rows.routes.desired == before
    tables.nodes.delete("two")
    engine.step()
    assert rows.routes.desired == {OWN: Route(0)}
