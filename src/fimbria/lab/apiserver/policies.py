"""NetworkPolicy: defaults and validation, each error naming its field as kube-apiserver's does."""

from __future__ import annotations

import ipaddress

from fimbria.lab.apiserver import validation
from fimbria.lab.apiserver.errors import FieldError, forbidden_field, invalid, not_supported, required
from fimbria.lab.apiserver.model import Obj
from fimbria.lab.apiserver.strategy import Strategy


class NetworkPolicyStrategy(Strategy):
    has_generation = True

    def default(self, obj: Obj) -> None:
        spec = obj.setdefault("spec", {})
        spec.setdefault("podSelector", {})
        for rule in [*(spec.get("ingress") or []), *(spec.get("egress") or [])]:
            for port in rule.get("ports") or []:
                port.setdefault("protocol", "TCP")
        if not spec.get("policyTypes"):
            spec["policyTypes"] = ["Ingress", "Egress"] if spec.get("egress") else ["Ingress"]

    def validate(self, obj: Obj, old: Obj | None) -> list[FieldError]:
        spec = obj["spec"]
        errors = validation.label_selector(spec["podSelector"], "spec.podSelector")
        for direction, peers in (("ingress", "from"), ("egress", "to")):
            for at, rule in enumerate(spec.get(direction) or []):
                where = f"spec.{direction}[{at}]"
                for number, port in enumerate(rule.get("ports") or []):
                    errors += _port(port, f"{where}.ports[{number}]")
                for number, peer in enumerate(rule.get(peers) or []):
                    errors += _peer(peer, f"{where}.{peers}[{number}]")
        if len(spec["policyTypes"]) > 2:
            errors.append(invalid("spec.policyTypes", spec["policyTypes"], "may not specify more than two policyTypes"))
            return errors
        for at, kind in enumerate(spec["policyTypes"]):
            if kind not in ("Ingress", "Egress"):
                errors.append(not_supported(f"spec.policyTypes[{at}]", kind, ["Egress", "Ingress"]))
        return errors


def _port(port: Obj, field: str) -> list[FieldError]:
    errors: list[FieldError] = []
    if port["protocol"] not in ("TCP", "UDP", "SCTP"):
        errors.append(not_supported(f"{field}.protocol", port["protocol"], ["SCTP", "TCP", "UDP"]))
    number, end = port.get("port"), port.get("endPort")
    if number is None:
        if end is not None:
            errors.append(invalid(f"{field}.endPort", end, "may not be specified when `port` is not specified"))
        return errors
    errors += validation.port_or_name(number, f"{field}.port")
    if end is None:
        return errors
    if isinstance(number, str):
        errors.append(invalid(f"{field}.endPort", end, "may not be specified when `port` is non-numeric"))
        return errors
    if end < number:
        errors.append(invalid(f"{field}.endPort", end, "must be greater than or equal to `port`"))
    return errors + validation.port_number(end, f"{field}.endPort")


def _peer(peer: Obj, field: str) -> list[FieldError]:
    errors: list[FieldError] = []
    for key in ("podSelector", "namespaceSelector"):
        if key in peer:
            errors += validation.label_selector(peer[key], f"{field}.{key}")
    if "ipBlock" in peer:
        errors += _ip_block(peer["ipBlock"], f"{field}.ipBlock")
    if not peer:
        errors.append(required(field, "must specify a peer"))
    elif "ipBlock" in peer and len(peer) > 1:
        errors.append(forbidden_field(field, "may not specify both ipBlock and another peer"))
    return errors


def _ip_block(block: Obj, field: str) -> list[FieldError]:
    cidr = block.get("cidr") or ""
    if not cidr:
        return [required(f"{field}.cidr")]
    network = validation.parse_cidr(cidr)
    errors = validation.cidr(cidr, f"{field}.cidr")
    if network is None:
        return errors
    for at, text in enumerate(block.get("except") or []):
        where, inner = f"{field}.except[{at}]", validation.parse_cidr(text)
        errors += validation.cidr(text, where)
        if inner is not None and not _strictly_inside(inner, network):
            errors.append(invalid(where, text, "must be a strict subset of `cidr`"))
    return errors


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def _strictly_inside(inner: Network, outer: Network) -> bool:
    return inner.version == outer.version and inner.prefixlen > outer.prefixlen and inner.network_address in outer
