"""core/v1, discovery.k8s.io/v1 and coordination.k8s.io/v1."""

import msgspec

from fimbria.sources.k8s.types.meta import ApiObject, Condition, Obj, ObjectReference

# --- Namespace and Node ------------------------------------------------------------------------------------------


class Namespace(ApiObject, frozen=True):
    pass


class Taint(Obj, frozen=True):
    key: str = ""
    value: str = ""
    effect: str = ""


class NodeSpec(Obj, frozen=True):
    pod_cidr: str = msgspec.field(default="", name="podCIDR")
    pod_cidrs: tuple[str, ...] | None = msgspec.field(default=None, name="podCIDRs")
    provider_id: str = msgspec.field(default="", name="providerID")
    unschedulable: bool = False
    taints: tuple[Taint, ...] | None = None


class NodeAddress(Obj, frozen=True):
    """`type` is InternalIP, ExternalIP, Hostname, InternalDNS or ExternalDNS."""

    type: str = ""
    address: str = ""


class NodeStatus(Obj, frozen=True):
    addresses: tuple[NodeAddress, ...] | None = None
    conditions: tuple[Condition, ...] | None = None


class Node(ApiObject, frozen=True):
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()


# --- Pod ---------------------------------------------------------------------------------------------------------


class ContainerPort(Obj, frozen=True):
    name: str = ""
    container_port: int = 0
    host_port: int = 0
    host_ip: str = msgspec.field(default="", name="hostIP")
    protocol: str = "TCP"


class Container(Obj, frozen=True):
    name: str = ""
    ports: tuple[ContainerPort, ...] | None = None
    restart_policy: str = ""  # "Always" on an init container makes it a sidecar, whose ports count as the pod's


class PodSpec(Obj, frozen=True):
    node_name: str = ""
    host_network: bool = False
    service_account_name: str = ""
    containers: tuple[Container, ...] | None = None
    init_containers: tuple[Container, ...] | None = None


class PodIP(Obj, frozen=True):
    ip: str = ""


class PodStatus(Obj, frozen=True):
    phase: str = ""
    reason: str = ""
    pod_ip: str = msgspec.field(default="", name="podIP")
    pod_ips: tuple[PodIP, ...] | None = msgspec.field(default=None, name="podIPs")
    host_ip: str = msgspec.field(default="", name="hostIP")
    host_ips: tuple[PodIP, ...] | None = msgspec.field(default=None, name="hostIPs")
    conditions: tuple[Condition, ...] | None = None
    start_time: str | None = None


class Pod(ApiObject, frozen=True):
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


# --- Service and EndpointSlice -----------------------------------------------------------------------------------


class ServicePort(Obj, frozen=True):
    """`target_port` 0 or absent means `port`; text names a port of the pod."""

    name: str = ""
    protocol: str = "TCP"
    port: int = 0
    target_port: int | str = 0
    node_port: int = 0
    app_protocol: str | None = None


class ClientIPConfig(Obj, frozen=True):
    timeout_seconds: int | None = None  # seconds; the API's default is 10,800


class SessionAffinityConfig(Obj, frozen=True):
    client_ip: ClientIPConfig | None = msgspec.field(default=None, name="clientIP")


class ServiceSpec(Obj, frozen=True):
    """Everything a service proxy acts on. `cluster_ip` is "None" for headless services."""

    type: str = "ClusterIP"
    ports: tuple[ServicePort, ...] | None = None
    selector: dict[str, str] | None = None
    cluster_ip: str = msgspec.field(default="", name="clusterIP")
    cluster_ips: tuple[str, ...] | None = msgspec.field(default=None, name="clusterIPs")
    external_ips: tuple[str, ...] | None = msgspec.field(default=None, name="externalIPs")
    external_name: str = ""
    ip_families: tuple[str, ...] | None = None
    ip_family_policy: str | None = None
    session_affinity: str = "None"
    session_affinity_config: SessionAffinityConfig | None = None
    load_balancer_ip: str = msgspec.field(default="", name="loadBalancerIP")
    load_balancer_class: str | None = None
    load_balancer_source_ranges: tuple[str, ...] | None = None
    allocate_load_balancer_node_ports: bool | None = None
    external_traffic_policy: str = ""
    internal_traffic_policy: str | None = None
    traffic_distribution: str | None = None
    health_check_node_port: int = 0
    publish_not_ready_addresses: bool = False


class PortStatus(Obj, frozen=True):
    port: int = 0
    protocol: str = ""
    error: str | None = None


class LoadBalancerIngress(Obj, frozen=True):
    """`ip_mode` VIP (the default) is handled by the node itself, Proxy leaves the address to the balancer."""

    ip: str = ""
    hostname: str = ""
    ip_mode: str | None = None
    ports: tuple[PortStatus, ...] | None = None


class LoadBalancerStatus(Obj, frozen=True):
    ingress: tuple[LoadBalancerIngress, ...] | None = None


class ServiceStatus(Obj, frozen=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()
    conditions: tuple[Condition, ...] | None = None


class Service(ApiObject, frozen=True):
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()


class EndpointConditions(Obj, frozen=True):
    """Absent `ready` and `serving` read as true, absent `terminating` as false (discovery.k8s.io/v1)."""

    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ForZone(Obj, frozen=True):
    name: str = ""


class ForNode(Obj, frozen=True):
    name: str = ""


class EndpointHints(Obj, frozen=True):
    for_zones: tuple[ForZone, ...] | None = None
    for_nodes: tuple[ForNode, ...] | None = None


class Endpoint(Obj, frozen=True):
    """All `addresses` are one endpoint; consumers use the first."""

    addresses: tuple[str, ...] | None = None
    conditions: EndpointConditions = EndpointConditions()
    hostname: str | None = None
    node_name: str | None = None
    zone: str | None = None
    target_ref: ObjectReference | None = None
    hints: EndpointHints | None = None


class EndpointPort(Obj, frozen=True):
    """A missing `port` means all ports; a missing `name` reads as ""."""

    name: str | None = None
    protocol: str | None = None
    port: int | None = None
    app_protocol: str | None = None


class EndpointSlice(ApiObject, frozen=True):
    """Belongs to the service named by its label `kubernetes.io/service-name`."""

    address_type: str = ""
    endpoints: tuple[Endpoint, ...] | None = None
    ports: tuple[EndpointPort, ...] | None = None


# --- Lease and Event ---------------------------------------------------------------------------------------------


class LeaseSpec(Obj, frozen=True):
    """Times are RFC 3339 with microseconds."""

    holder_identity: str | None = None
    lease_duration_seconds: int | None = None
    acquire_time: str | None = None
    renew_time: str | None = None
    lease_transitions: int | None = None


class Lease(ApiObject, frozen=True):
    spec: LeaseSpec = LeaseSpec()


class EventSource(Obj, frozen=True):
    component: str = ""
    host: str = ""


class Event(ApiObject, frozen=True):
    involved_object: ObjectReference = ObjectReference()
    reason: str = ""
    message: str = ""
    type: str = ""
    count: int = 0
    first_timestamp: str | None = None
    last_timestamp: str | None = None
    source: EventSource = EventSource()
    reporting_component: str = ""
    reporting_instance: str = ""
