"""The engine's answers: what changes() says, what is shared, who is named."""

from __future__ import annotations

import pytest

from fimbria.compute.policy import Changes, EndpointPolicy, PolicyEngine
from fimbria.compute.policy_set import SetKey
from fimbria.decide.numbers import Numbers
from fimbria.model.address import Prefix
from fimbria.model.identity import SCOPE_CIDR
from fimbria.model.labels import Labels
from fimbria.model.policy import (
    ANYONE,
    EVERY_PORT,
    CidrBlock,
    Direction,
    NamedPort,
    Operator,
    Origin,
    Peer,
    Policy,
    PolicyId,
    PolicySpec,
    PortRange,
    Proto,
    Requirement,
    Rule,
    Selector,
    Verdict,
)
from fimbria.model.rows import Cidr, PolicyEntry, PolicyKey, PrefixKey

WEB = Labels({"k8s:app": "web"})
CART = Labels({"k8s:app": "cart"})
HTTP = PortRange(Proto.TCP, 80, 80)


def app(name: str) -> Selector:
    return Selector([Requirement(("k8s:app",), Operator.IN, (name,))])


def policy(name: str, *peers: Peer, port: PortRange | NamedPort = HTTP, subject: str = "web") -> Policy:
    policy_id = PolicyId("NetworkPolicy", "shop", name)
    rule = Rule(Direction.INGRESS, Verdict.ALLOW, peers, (port,), Origin(policy_id, "ingress[0]"))
    return Policy(policy_id, (PolicySpec(app(subject), (rule,), frozenset({Direction.INGRESS})),))


def key_of(*names: str) -> SetKey:
    return SetKey(tuple((PolicyId("NetworkPolicy", "shop", name), 0) for name in names))


@pytest.fixture
def engine() -> PolicyEngine:
    made = PolicyEngine(Numbers[Origin]("rules").take, Numbers[Prefix]("CIDRs", 1, SCOPE_CIDR - 1).take)
    made.upsert_identity(300, WEB)
    made.upsert_identity(301, CART)
    made.upsert_endpoint("one", WEB)
    made.upsert_endpoint("two", WEB)
    made.changes()
    return made


def row(peer: int, rule: int = 1) -> dict[PolicyKey, PolicyEntry]:
    return {PolicyKey(64, peer, 0, 6, 80): PolicyEntry(1, 0, rule)}


def test_a_policy_makes_one_set_for_all_it_selects(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", app("cart")))
    changes = engine.changes()
    assert changes.sets.keys() == {key_of("p")} and changes.sets[key_of("p")].created
    assert changes.sets[key_of("p")].upserts == row(301)
    assert changes.endpoints == {"one", "two"}
    assert engine.endpoint("one") == engine.endpoint("two") == EndpointPolicy(key_of("p"), 2)


def test_nothing_new_is_no_change(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", app("cart")))
    assert engine.changes()
    engine.upsert_policy(policy("p", app("cart")))
    engine.upsert_identity(301, CART)
    engine.upsert_endpoint("one", WEB)
    assert engine.changes() == Changes()


def test_an_identity_touches_only_sets_that_speak_of_it(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", app("cart")))
    engine.upsert_endpoint("three", CART)
    engine.upsert_policy(policy("q", app("db"), subject="cart"))
    engine.changes()
    engine.upsert_identity(302, Labels({"k8s:app": "cart", "k8s:v": "2"}))
    changes = engine.changes()
    assert changes.sets.keys() == {key_of("p")}
    assert changes.sets[key_of("p")].upserts == row(302) and not changes.sets[key_of("p")].created
    engine.delete_identity(302)
    assert engine.changes().sets[key_of("p")].deletes == set(row(302))


def test_a_changed_rule_changes_the_set_in_place(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", app("cart")))
    engine.changes()
    engine.upsert_policy(policy("p", ANYONE))
    changes = engine.changes()
    assert changes.sets[key_of("p")].upserts == row(0) and changes.sets[key_of("p")].deletes == set(row(301))
    assert not changes.endpoints and not changes.gone


def test_another_selection_is_another_set(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", app("cart")))
    engine.changes()
    engine.upsert_policy(policy("q", ANYONE))
    changes = engine.changes()
    assert changes.gone == {key_of("p")} and changes.sets[key_of("p", "q")].created
    assert changes.endpoints == {"one", "two"}
    engine.delete_policy(policy("p").id)
    engine.delete_policy(policy("q").id)
    changes = engine.changes()
    assert changes.gone == {key_of("p", "q")} and engine.endpoint("one") == EndpointPolicy()


def test_policies_that_select_nobody_here_cost_nothing(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", CidrBlock(Prefix.parse("10.0.0.0/8")), subject="elsewhere"))
    assert engine.changes() == Changes()
    assert not engine.cidrs() and not engine.origins()


def test_prefixes_come_and_go_with_the_rules_that_name_them(engine: PolicyEngine) -> None:
    block = CidrBlock(Prefix.parse("10.0.0.0/8"), (Prefix.parse("10.1.0.0/16"),))
    engine.upsert_policy(policy("p", block))
    changes = engine.changes()
    wide, hole = PrefixKey(104, block.prefix.addr), PrefixKey(112, block.excepts[0].addr)
    assert changes.cidrs == {wide: Cidr(SCOPE_CIDR | 1), hole: Cidr(SCOPE_CIDR | 2)}
    assert changes.sets[key_of("p")].upserts == row(SCOPE_CIDR | 1)
    assert engine.endpoint("one").flags == 2 | 8
    assert engine.prefixes() == {block.prefix, *block.excepts}
    engine.upsert_policy(policy("p", ANYONE))
    assert engine.changes().cidrs == {wide: None, hole: None}
    assert engine.endpoint("one").flags == 2


def test_flags_that_change_are_told(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", ANYONE))
    engine.changes()
    engine.upsert_policy(policy("p", CidrBlock(Prefix.parse("10.0.0.0/8"))))
    assert engine.changes().endpoints == {"one", "two"}


def test_a_rule_number_leads_back_to_where_it_is_written(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", ANYONE))
    engine.changes()
    assert str(engine.explain(1)) == "NetworkPolicy shop/p ingress[0]"
    assert engine.explain(99) is None
    assert engine.denying("one", Direction.INGRESS) == [policy("p").id]
    assert engine.denying("one", Direction.EGRESS) == []
    engine.delete_policy(policy("p").id)
    engine.changes()
    assert engine.explain(1) is None and not engine.origins()


def test_pods_that_number_a_named_port_alike_share_a_set(engine: PolicyEngine) -> None:
    engine.upsert_endpoint("one", WEB, frozenset({("http", 6, 80), ("other", 6, 1)}))
    engine.upsert_endpoint("two", WEB, frozenset({("http", 6, 80)}))
    engine.upsert_policy(policy("p", ANYONE, port=NamedPort(Proto.TCP, "http")))
    engine.changes()
    assert engine.endpoint("one") == engine.endpoint("two")
    engine.upsert_endpoint("two", WEB, frozenset({("http", 6, 8080)}))
    changes = engine.changes()
    assert changes.endpoints == {"two"} and len(engine.sets()) == 2


def test_an_endpoint_that_goes_takes_its_set_along(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", ANYONE, port=EVERY_PORT))
    engine.changes()
    engine.delete_endpoint("one")
    assert not engine.changes().gone
    engine.delete_endpoint("two")
    engine.delete_endpoint("unknown")
    assert engine.changes().gone == {key_of("p")}
    with pytest.raises(KeyError):
        engine.endpoint("one")
    with pytest.raises(KeyError):
        engine.policy_set(key_of("p"))


def test_come_and_gone_between_two_looks_is_nothing(engine: PolicyEngine) -> None:
    engine.upsert_policy(policy("p", CidrBlock(Prefix.parse("10.0.0.0/8"))))
    engine.delete_policy(policy("p").id)
    engine.upsert_endpoint("three", CART)
    engine.delete_endpoint("three")
    assert engine.changes() == Changes()


def test_sets_are_called_by_what_they_are_made_of() -> None:
    key = SetKey((*key_of("a").units, (PolicyId("CiliumNetworkPolicy", "shop", "b"), 1)), (("http", 6, 80),))
    assert str(key) == "NetworkPolicy shop/a + CiliumNetworkPolicy shop/b#1 with http=80/6"
