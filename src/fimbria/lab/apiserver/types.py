"""The built-in types, written once: what fields they have and how lists in them merge.

From this one table come strict decoding (unknown and mistyped fields), strategic merge patch and server-side apply
(merge keys), and the structural half of the OpenAPI documents. Source: the Kubernetes API reference, v1.

A type is a line of ``field:type`` words. Types: ``s`` string, ``i`` integer, ``b`` boolean, ``n`` number, ``q`` quantity,
``is`` integer or string, ``t`` time, ``any`` anything, ``Name`` another type, ``{T}`` a map, ``[T]`` a list replaced as
a whole, ``[T|key,key]`` a list merged by keys, ``[T|]`` a list merged as a set.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

META = """
ObjectMeta = name:s generateName:s namespace:s selfLink:s uid:s resourceVersion:s generation:i creationTimestamp:t
 deletionTimestamp:t deletionGracePeriodSeconds:i labels:{s} annotations:{s} ownerReferences:[OwnerReference|uid]
 finalizers:[s|] managedFields:[any]
OwnerReference = apiVersion:s kind:s name:s uid:s controller:b blockOwnerDeletion:b
LabelSelector = matchLabels:{s} matchExpressions:[LabelSelectorRequirement]
LabelSelectorRequirement = key:s operator:s values:[s]
Condition = type:s status:s observedGeneration:i lastTransitionTime:t reason:s message:s
LocalObjectReference = name:s
ObjectReference = kind:s namespace:s name:s uid:s apiVersion:s resourceVersion:s fieldPath:s
TypedLocalObjectReference = apiGroup:s kind:s name:s
"""

POD = """
Pod = spec:PodSpec status:PodStatus
PodTemplateSpec = metadata:ObjectMeta spec:PodSpec
PodSpec = volumes:[Volume|name] initContainers:[Container|name] containers:[Container|name]
 ephemeralContainers:[EphemeralContainer|name] restartPolicy:s terminationGracePeriodSeconds:i activeDeadlineSeconds:i
 dnsPolicy:s nodeSelector:{s} serviceAccountName:s serviceAccount:s automountServiceAccountToken:b nodeName:s
 hostNetwork:b hostPID:b hostIPC:b shareProcessNamespace:b securityContext:PodSecurityContext
 imagePullSecrets:[LocalObjectReference|name] hostname:s subdomain:s affinity:Affinity schedulerName:s
 tolerations:[Toleration] hostAliases:[HostAlias|ip] priorityClassName:s priority:i dnsConfig:PodDNSConfig
 readinessGates:[PodReadinessGate] runtimeClassName:s enableServiceLinks:b preemptionPolicy:s overhead:{q}
 topologySpreadConstraints:[TopologySpreadConstraint|topologyKey,whenUnsatisfiable] setHostnameAsFQDN:b os:PodOS
 hostUsers:b schedulingGates:[PodSchedulingGate|name] resourceClaims:[any|name] resources:ResourceRequirements
 hostnameOverride:s workloadRef:any schedulingGroup:any
PodOS = name:s
PodSchedulingGate = name:s
PodReadinessGate = conditionType:s
HostAlias = ip:s hostnames:[s]
PodDNSConfig = nameservers:[s] searches:[s] options:[PodDNSConfigOption]
PodDNSConfigOption = name:s value:s
Toleration = key:s operator:s value:s effect:s tolerationSeconds:i
TopologySpreadConstraint = maxSkew:i topologyKey:s whenUnsatisfiable:s labelSelector:LabelSelector minDomains:i
 nodeAffinityPolicy:s nodeTaintsPolicy:s matchLabelKeys:[s]
Affinity = nodeAffinity:NodeAffinity podAffinity:PodAffinity podAntiAffinity:PodAffinity
NodeAffinity = requiredDuringSchedulingIgnoredDuringExecution:NodeSelector
 preferredDuringSchedulingIgnoredDuringExecution:[PreferredSchedulingTerm]
NodeSelector = nodeSelectorTerms:[NodeSelectorTerm]
NodeSelectorTerm = matchExpressions:[LabelSelectorRequirement] matchFields:[LabelSelectorRequirement]
PreferredSchedulingTerm = weight:i preference:NodeSelectorTerm
PodAffinity = requiredDuringSchedulingIgnoredDuringExecution:[PodAffinityTerm]
 preferredDuringSchedulingIgnoredDuringExecution:[WeightedPodAffinityTerm]
PodAffinityTerm = labelSelector:LabelSelector namespaces:[s] topologyKey:s namespaceSelector:LabelSelector
 matchLabelKeys:[s] mismatchLabelKeys:[s]
WeightedPodAffinityTerm = weight:i podAffinityTerm:PodAffinityTerm
PodSecurityContext = seLinuxOptions:any windowsOptions:any runAsUser:i runAsGroup:i runAsNonRoot:b
 supplementalGroups:[i] supplementalGroupsPolicy:s fsGroup:i sysctls:[Sysctl] fsGroupChangePolicy:s
 seccompProfile:any appArmorProfile:any seLinuxChangePolicy:s
Sysctl = name:s value:s
Container = name:s image:s command:[s] args:[s] workingDir:s ports:[ContainerPort|containerPort,protocol]
 envFrom:[EnvFromSource] env:[EnvVar|name] resources:ResourceRequirements resizePolicy:[ResizePolicy]
 restartPolicy:s restartPolicyRules:[any] volumeMounts:[VolumeMount|mountPath] volumeDevices:[VolumeDevice|devicePath]
 livenessProbe:Probe readinessProbe:Probe startupProbe:Probe lifecycle:Lifecycle terminationMessagePath:s
 terminationMessagePolicy:s imagePullPolicy:s securityContext:SecurityContext stdin:b stdinOnce:b tty:b
EphemeralContainer = Container targetContainerName:s
ContainerPort = name:s hostPort:i containerPort:i protocol:s hostIP:s
ResizePolicy = resourceName:s restartPolicy:s
EnvFromSource = prefix:s configMapRef:KeyRef secretRef:KeyRef
KeyRef = name:s key:s optional:b
EnvVar = name:s value:s valueFrom:EnvVarSource
EnvVarSource = fieldRef:ObjectFieldSelector resourceFieldRef:any configMapKeyRef:KeyRef secretKeyRef:KeyRef fileKeyRef:any
ObjectFieldSelector = apiVersion:s fieldPath:s
ResourceRequirements = limits:{q} requests:{q} claims:[any|name]
VolumeMount = name:s readOnly:b recursiveReadOnly:s mountPath:s subPath:s mountPropagation:s subPathExpr:s
VolumeDevice = name:s devicePath:s
Probe = exec:ExecAction httpGet:HTTPGetAction tcpSocket:TCPSocketAction grpc:GRPCAction initialDelaySeconds:i
 timeoutSeconds:i periodSeconds:i successThreshold:i failureThreshold:i terminationGracePeriodSeconds:i
ExecAction = command:[s]
HTTPGetAction = path:s port:is host:s scheme:s httpHeaders:[HTTPHeader]
HTTPHeader = name:s value:s
TCPSocketAction = port:is host:s
GRPCAction = port:i service:s
Lifecycle = postStart:LifecycleHandler preStop:LifecycleHandler stopSignal:s
LifecycleHandler = exec:ExecAction httpGet:HTTPGetAction tcpSocket:TCPSocketAction sleep:any
SecurityContext = capabilities:Capabilities privileged:b seLinuxOptions:any windowsOptions:any runAsUser:i runAsGroup:i
 runAsNonRoot:b readOnlyRootFilesystem:b allowPrivilegeEscalation:b procMount:s seccompProfile:any appArmorProfile:any
Capabilities = add:[s] drop:[s]
Volume = name:s hostPath:HostPathVolume emptyDir:EmptyDirVolume configMap:ConfigMapVolume secret:SecretVolume
 projected:ProjectedVolume downwardAPI:DownwardAPIVolume persistentVolumeClaim:any csi:any nfs:any iscsi:any ephemeral:any
 image:any glusterfs:any rbd:any flexVolume:any cinder:any cephfs:any flocker:any fc:any azureFile:any azureDisk:any
 vsphereVolume:any quobyte:any photonPersistentDisk:any portworxVolume:any scaleIO:any storageos:any gitRepo:any
 gcePersistentDisk:any awsElasticBlockStore:any
HostPathVolume = path:s type:s
EmptyDirVolume = medium:s sizeLimit:q
ConfigMapVolume = name:s items:[KeyToPath] defaultMode:i optional:b
SecretVolume = secretName:s items:[KeyToPath] defaultMode:i optional:b
KeyToPath = key:s path:s mode:i
ProjectedVolume = sources:[any] defaultMode:i
DownwardAPIVolume = items:[any] defaultMode:i
PodStatus = observedGeneration:i phase:s conditions:[PodCondition|type] message:s reason:s nominatedNodeName:s hostIP:s
 hostIPs:[HostIP] podIP:s podIPs:[PodIP|ip] startTime:t initContainerStatuses:[ContainerStatus]
 containerStatuses:[ContainerStatus] qosClass:s ephemeralContainerStatuses:[ContainerStatus] resize:s
 resourceClaimStatuses:[any|name] extendedResourceClaimStatus:any allocatedResources:{q} resources:ResourceRequirements
PodCondition = type:s observedGeneration:i status:s lastProbeTime:t lastTransitionTime:t reason:s message:s
HostIP = ip:s
PodIP = ip:s
ContainerStatus = name:s state:ContainerState lastState:ContainerState ready:b restartCount:i image:s imageID:s
 containerID:s started:b allocatedResources:{q} resources:ResourceRequirements volumeMounts:[any|mountPath] user:any
 allocatedResourcesStatus:[any|name] stopSignal:s
ContainerState = waiting:ContainerStateWaiting running:ContainerStateRunning terminated:ContainerStateTerminated
ContainerStateWaiting = reason:s message:s
ContainerStateRunning = startedAt:t
ContainerStateTerminated = exitCode:i signal:i reason:s message:s startedAt:t finishedAt:t containerID:s
Binding = target:ObjectReference
"""

CORE = """
Namespace = spec:NamespaceSpec status:NamespaceStatus
NamespaceSpec = finalizers:[s]
NamespaceStatus = phase:s conditions:[Condition|type]
Node = spec:NodeSpec status:NodeStatus
NodeSpec = podCIDR:s podCIDRs:[s|] providerID:s unschedulable:b taints:[Taint] configSource:any externalID:s
Taint = key:s value:s effect:s timeAdded:t
NodeStatus = capacity:{q} allocatable:{q} phase:s conditions:[NodeCondition|type] addresses:[NodeAddress|type]
 daemonEndpoints:any nodeInfo:any images:[any] volumesInUse:[s] volumesAttached:[any|name] config:any features:any
 runtimeHandlers:[any] declaredFeatures:[s]
NodeCondition = type:s status:s lastHeartbeatTime:t lastTransitionTime:t reason:s message:s
NodeAddress = type:s address:s
Service = spec:ServiceSpec status:ServiceStatus
ServiceSpec = ports:[ServicePort|port,protocol] selector:{s} clusterIP:s clusterIPs:[s] type:s externalIPs:[s]
 sessionAffinity:s loadBalancerIP:s loadBalancerSourceRanges:[s] externalName:s externalTrafficPolicy:s
 healthCheckNodePort:i publishNotReadyAddresses:b sessionAffinityConfig:SessionAffinityConfig ipFamilies:[s]
 ipFamilyPolicy:s allocateLoadBalancerNodePorts:b loadBalancerClass:s internalTrafficPolicy:s trafficDistribution:s
ServicePort = name:s protocol:s appProtocol:s port:i targetPort:is nodePort:i
SessionAffinityConfig = clientIP:ClientIPConfig
ClientIPConfig = timeoutSeconds:i
ServiceStatus = loadBalancer:LoadBalancerStatus conditions:[Condition|type]
LoadBalancerStatus = ingress:[LoadBalancerIngress]
LoadBalancerIngress = ip:s hostname:s ipMode:s ports:[any]
Endpoints = subsets:[EndpointSubset]
EndpointSubset = addresses:[EndpointAddress] notReadyAddresses:[EndpointAddress] ports:[EndpointPort]
EndpointAddress = ip:s hostname:s nodeName:s targetRef:ObjectReference
EndpointPort = name:s port:i protocol:s appProtocol:s
ConfigMap = immutable:b data:{s} binaryData:{s}
Secret = immutable:b data:{s} stringData:{s} type:s
ServiceAccount = secrets:[ObjectReference|name] imagePullSecrets:[LocalObjectReference] automountServiceAccountToken:b
CoreEvent = involvedObject:ObjectReference reason:s message:s source:EventSource firstTimestamp:t lastTimestamp:t count:i
 type:s eventTime:t series:EventSeries action:s related:ObjectReference reportingComponent:s reportingInstance:s
EventSource = component:s host:s
EventSeries = count:i lastObservedTime:t
Event = eventTime:t series:EventSeries reportingController:s reportingInstance:s action:s reason:s
 regarding:ObjectReference related:ObjectReference note:s type:s deprecatedSource:EventSource
 deprecatedFirstTimestamp:t deprecatedLastTimestamp:t deprecatedCount:i
"""

GROUPS = """
Deployment = spec:DeploymentSpec status:DeploymentStatus
DeploymentSpec = replicas:i selector:LabelSelector template:PodTemplateSpec strategy:DeploymentStrategy minReadySeconds:i
 revisionHistoryLimit:i paused:b progressDeadlineSeconds:i
DeploymentStrategy = type:s rollingUpdate:RollingUpdate
RollingUpdate = maxUnavailable:is maxSurge:is
DeploymentStatus = observedGeneration:i replicas:i updatedReplicas:i readyReplicas:i availableReplicas:i
 unavailableReplicas:i terminatingReplicas:i collisionCount:i conditions:[DeploymentCondition|type]
DeploymentCondition = type:s status:s lastUpdateTime:t lastTransitionTime:t reason:s message:s
ReplicaSet = spec:ReplicaSetSpec status:ReplicaSetStatus
ReplicaSetSpec = replicas:i minReadySeconds:i selector:LabelSelector template:PodTemplateSpec
ReplicaSetStatus = replicas:i fullyLabeledReplicas:i readyReplicas:i availableReplicas:i terminatingReplicas:i
 observedGeneration:i conditions:[Condition|type]
DaemonSet = spec:DaemonSetSpec status:DaemonSetStatus
DaemonSetSpec = selector:LabelSelector template:PodTemplateSpec updateStrategy:DeploymentStrategy minReadySeconds:i
 revisionHistoryLimit:i
DaemonSetStatus = currentNumberScheduled:i numberMisscheduled:i desiredNumberScheduled:i numberReady:i
 observedGeneration:i updatedNumberScheduled:i numberAvailable:i numberUnavailable:i collisionCount:i
 conditions:[Condition|type]
Scale = spec:ScaleSpec status:ScaleStatus
ScaleSpec = replicas:i
ScaleStatus = replicas:i selector:s
EndpointSlice = addressType:s endpoints:[Endpoint] ports:[EndpointPort]
Endpoint = addresses:[s|] conditions:EndpointConditions hostname:s targetRef:ObjectReference deprecatedTopology:{s}
 nodeName:s zone:s hints:any
EndpointConditions = ready:b serving:b terminating:b
NetworkPolicy = spec:NetworkPolicySpec
NetworkPolicySpec = podSelector:LabelSelector ingress:[IngressRule] egress:[EgressRule] policyTypes:[s]
IngressRule = ports:[NetworkPolicyPort] from:[NetworkPolicyPeer]
EgressRule = ports:[NetworkPolicyPort] to:[NetworkPolicyPeer]
NetworkPolicyPort = protocol:s port:is endPort:i
NetworkPolicyPeer = podSelector:LabelSelector namespaceSelector:LabelSelector ipBlock:IPBlock
IPBlock = cidr:s except:[s]
Lease = spec:LeaseSpec
LeaseSpec = holderIdentity:s leaseDurationSeconds:i acquireTime:t renewTime:t leaseTransitions:i strategy:s
 preferredHolder:s
Role = rules:[PolicyRule]
ClusterRole = rules:[PolicyRule] aggregationRule:any
PolicyRule = verbs:[s] apiGroups:[s] resources:[s] resourceNames:[s] nonResourceURLs:[s]
RoleBinding = subjects:[Subject] roleRef:RoleRef
ClusterRoleBinding = subjects:[Subject] roleRef:RoleRef
Subject = kind:s apiGroup:s name:s namespace:s
RoleRef = apiGroup:s kind:s name:s
CustomResourceDefinition = spec:CRDSpec status:CRDStatus
CRDSpec = group:s names:CRDNames scope:s versions:[CRDVersion] conversion:any preserveUnknownFields:b
CRDNames = plural:s singular:s shortNames:[s] kind:s listKind:s categories:[s]
CRDVersion = name:s served:b storage:b deprecated:b deprecationWarning:s schema:CRDValidation subresources:any
 additionalPrinterColumns:[CRDColumn] selectableFields:[SelectableField]
CRDValidation = openAPIV3Schema:any
CRDColumn = name:s type:s format:s description:s priority:i jsonPath:s
SelectableField = jsonPath:s
CRDStatus = conditions:[Condition|type] acceptedNames:CRDNames storedVersions:[s] observedGeneration:i
"""


@dataclass(frozen=True)
class Type:
    """A parsed type: a scalar or type name, or a list or map of ``item``; ``keys`` is None for atomic lists."""

    name: str
    item: Type | None = None
    keys: tuple[str, ...] | None = None

    @property
    def is_list(self) -> bool:
        return self.name == "[]"

    @property
    def is_map(self) -> bool:
        return self.name == "{}"

    @property
    def fields(self) -> dict[str, Type] | None:
        """The fields of a struct; None for everything else."""
        return TYPES.get(self.name)


ANY = Type("any")


@cache
def parse_type(text: str) -> Type:
    if text.startswith("{"):
        return Type("{}", parse_type(text[1:-1]))
    if not text.startswith("["):
        return Type(text)
    inner, merged, keys = text[1:-1].partition("|")
    names = tuple(keys.split(",")) if keys else ()
    return Type("[]", parse_type(inner), names if merged else None)


def _parse(text: str) -> dict[str, dict[str, Type]]:
    types: dict[str, dict[str, Type]] = {}
    for definition in text.replace("\n ", " ").strip().splitlines():
        name, _, words = definition.partition(" = ")
        fields = types[name] = {}
        for word in words.split():
            key, _, kind = word.partition(":")
            fields.update({key: parse_type(kind)} if kind else types[key])
    return types


TYPES = _parse(META + POD + CORE + GROUPS)
_TOP = {"apiVersion": Type("s"), "kind": Type("s"), "metadata": Type("ObjectMeta")}
TOP_LEVEL = (
    "Pod Binding Namespace Node Service Endpoints ConfigMap Secret ServiceAccount CoreEvent Event Deployment ReplicaSet "
    "DaemonSet Scale EndpointSlice NetworkPolicy Lease Role ClusterRole RoleBinding ClusterRoleBinding "
    "CustomResourceDefinition"
).split()
for _name in TOP_LEVEL:
    TYPES[_name] = _TOP | TYPES[_name]
TYPES["CustomObject"] = dict(_TOP)
