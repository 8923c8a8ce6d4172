"""cilium.io: CiliumNode, CiliumIdentity, CiliumEndpoint (v2), CiliumEndpointSlice (v2alpha1).

Policies are in `cilium_policy`.

The wire names mix camelCase and hyphens; where they are hyphenated the field says so.
"""

import msgspec

from fimbria.sources.k8s.types.meta import ApiObject, Obj

# --- CiliumNode --------------------------------------------------------------------------------------------------


class NodeAddress(Obj, frozen=True):
    """`type` is InternalIP, ExternalIP or CiliumInternalIP (the node's own address on the pod network)."""

    type: str = ""
    ip: str = ""


class AddressPair(Obj, frozen=True):
    ipv4: str = ""
    ipv6: str = ""


class EncryptionSpec(Obj, frozen=True):
    key: int = 0


class IPAMPoolDemand(Obj, frozen=True):
    ipv4_addrs: int = msgspec.field(default=0, name="ipv4-addrs")
    ipv6_addrs: int = msgspec.field(default=0, name="ipv6-addrs")


class IPAMPoolRequest(Obj, frozen=True):
    pool: str = ""
    needed: IPAMPoolDemand = IPAMPoolDemand()


class IPAMPoolAllocation(Obj, frozen=True):
    pool: str = ""
    cidrs: tuple[str, ...] | None = None


class IPAMPools(Obj, frozen=True):
    requested: tuple[IPAMPoolRequest, ...] | None = None
    allocated: tuple[IPAMPoolAllocation, ...] | None = None


class NodeIPAMSpec(Obj, frozen=True):
    pod_cidrs: tuple[str, ...] | None = msgspec.field(default=None, name="podCIDRs")
    pools: IPAMPools = IPAMPools()
    min_allocate: int = msgspec.field(default=0, name="min-allocate")
    max_allocate: int = msgspec.field(default=0, name="max-allocate")
    pre_allocate: int = msgspec.field(default=0, name="pre-allocate")
    max_above_watermark: int = msgspec.field(default=0, name="max-above-watermark")


class CiliumNodeSpec(Obj, frozen=True):
    instance_id: str = msgspec.field(default="", name="instance-id")
    boot_id: str = msgspec.field(default="", name="bootid")
    addresses: tuple[NodeAddress, ...] | None = None
    health: AddressPair = AddressPair()
    ingress: AddressPair = AddressPair()
    encryption: EncryptionSpec = EncryptionSpec()
    ipam: NodeIPAMSpec = NodeIPAMSpec()


class PodCIDRStatus(Obj, frozen=True):
    """`status` is released, depleted or in-use."""

    status: str = ""


class OperatorStatus(Obj, frozen=True):
    error: str = ""


class NodeIPAMStatus(Obj, frozen=True):
    pod_cidrs: dict[str, PodCIDRStatus] | None = msgspec.field(default=None, name="pod-cidrs")
    operator_status: OperatorStatus = msgspec.field(default=OperatorStatus(), name="operator-status")


class CiliumNodeStatus(Obj, frozen=True):
    ipam: NodeIPAMStatus = NodeIPAMStatus()


class CiliumNode(ApiObject, frozen=True):
    spec: CiliumNodeSpec = CiliumNodeSpec()
    status: CiliumNodeStatus = CiliumNodeStatus()


# --- CiliumIdentity ----------------------------------------------------------------------------------------------


class CiliumIdentity(ApiObject, frozen=True):
    """Cluster-scoped; its name is the number, its labels carry their source as a prefix (`k8s:app`)."""

    security_labels: dict[str, str] | None = msgspec.field(default=None, name="security-labels")


# --- CiliumEndpoint ----------------------------------------------------------------------------------------------


class EndpointIdentity(Obj, frozen=True):
    id: int = 0
    labels: tuple[str, ...] | None = None


class EndpointNetworking(Obj, frozen=True):
    """`node` is the address of the node that the endpoint runs on."""

    addressing: tuple[AddressPair, ...] | None = None
    node: str = ""


class NamedPort(Obj, frozen=True):
    name: str = ""
    port: int = 0
    protocol: str = ""


class ExternalIdentifiers(Obj, frozen=True):
    container_id: str = msgspec.field(default="", name="container-id")
    k8s_namespace: str = msgspec.field(default="", name="k8s-namespace")
    k8s_pod_name: str = msgspec.field(default="", name="k8s-pod-name")
    cni_attachment_id: str = msgspec.field(default="", name="cni-attachment-id")


class CiliumEndpointStatus(Obj, frozen=True):
    id: int = 0
    external_identifiers: ExternalIdentifiers = msgspec.field(
        default=ExternalIdentifiers(), name="external-identifiers"
    )
    identity: EndpointIdentity = EndpointIdentity()
    networking: EndpointNetworking = EndpointNetworking()
    encryption: EncryptionSpec = EncryptionSpec()
    named_ports: tuple[NamedPort, ...] | None = msgspec.field(default=None, name="named-ports")
    service_account: str = msgspec.field(default="", name="service-account")
    state: str = ""


class CiliumEndpoint(ApiObject, frozen=True):
    """Named like its pod, in its namespace. There is no spec: the agent reports what it made."""

    status: CiliumEndpointStatus = CiliumEndpointStatus()


# --- CiliumEndpointSlice -----------------------------------------------------------------------------------------


class CoreCiliumEndpoint(Obj, frozen=True):
    """What other nodes need of a CiliumEndpoint. `id` is its identity's number; `created`, which only we write, is when
    the CiliumEndpoint was created."""

    name: str = ""
    id: int = 0
    networking: EndpointNetworking = EndpointNetworking()
    encryption: EncryptionSpec = EncryptionSpec()
    named_ports: tuple[NamedPort, ...] | None = msgspec.field(default=None, name="named-ports")
    service_account: str = msgspec.field(default="", name="service-account")
    created: str = ""


class CiliumEndpointSlice(ApiObject, frozen=True):
    """Cluster-scoped; all its endpoints are of `namespace`."""

    namespace: str = ""
    endpoints: tuple[CoreCiliumEndpoint, ...] | None = None
