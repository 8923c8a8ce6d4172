"""networking.k8s.io/v1 NetworkPolicy, complete."""

import msgspec

from fimbria.sources.k8s.types.meta import ApiObject, LabelSelector, Obj


class IPBlock(Obj, frozen=True):
    cidr: str = ""
    except_: tuple[str, ...] | None = msgspec.field(default=None, name="except")


class NetworkPolicyPeer(Obj, frozen=True):
    """Exactly one of: `ip_block`, or one or both selectors (both: pods *in* those namespaces).

    An absent `namespace_selector` means the policy's own namespace, an empty one means all namespaces.
    """

    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class NetworkPolicyPort(Obj, frozen=True):
    """A number, a name, or absent for every port; `end_port` makes a range that starts at a numeric `port`."""

    protocol: str | None = None
    port: int | str | None = None
    end_port: int | None = None


class NetworkPolicyIngressRule(Obj, frozen=True):
    """Absent or empty `from_` means any source, absent or empty `ports` any port."""

    from_: tuple[NetworkPolicyPeer, ...] | None = msgspec.field(default=None, name="from")
    ports: tuple[NetworkPolicyPort, ...] | None = None


class NetworkPolicyEgressRule(Obj, frozen=True):
    """Absent or empty `to` means any destination, absent or empty `ports` any port."""

    to: tuple[NetworkPolicyPeer, ...] | None = None
    ports: tuple[NetworkPolicyPort, ...] | None = None


class NetworkPolicySpec(Obj, frozen=True):
    """Absent `policy_types` means Ingress, and Egress as well if there is any egress rule."""

    pod_selector: LabelSelector = LabelSelector()
    ingress: tuple[NetworkPolicyIngressRule, ...] | None = None
    egress: tuple[NetworkPolicyEgressRule, ...] | None = None
    policy_types: tuple[str, ...] | None = None


class NetworkPolicy(ApiObject, frozen=True):
    spec: NetworkPolicySpec = NetworkPolicySpec()
