"""The built-in types, written once: what fields they have and how lists in them merge.

From this one table come strict decoding (unknown and mistyped fields), strategic merge patch and server-side apply
(merge keys), the structural half of the OpenAPI documents, and decoding of protobuf, in which kubectl's typed commands
send. Source: the Kubernetes API reference, v1; numbers from the .proto files published with k8s.io/api.

A type is a line of ``field:type=number`` words. Types: ``s`` string, ``i`` integer, ``b`` boolean, ``n`` number,
``q`` quantity, ``is`` integer or string, ``t`` time, ``T`` time with microseconds, ``B`` base64 of bytes, ``any``
anything, ``Name`` another type, ``{T}`` a map, ``[T]`` a list replaced as a whole, ``[T|key,key]`` one merged by keys,
``[T|]`` a list merged as a set. ``number`` is the protobuf field number, ``1.2`` number 2 of the message embedded as 1;
a word ``Type:1`` stands for all fields of a type, embedded as 1. What has no number can't come in by protobuf.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

META = """
ObjectMeta = name:s=1 generateName:s=2 namespace:s=3 selfLink:s=4 uid:s=5 resourceVersion:s=6 generation:i=7
 creationTimestamp:t=8 deletionTimestamp:t=9 deletionGracePeriodSeconds:i=10 labels:{s}=11 annotations:{s}=12
 ownerReferences:[OwnerReference|uid]=13 finalizers:[s|]=14 managedFields:[any]=17
OwnerReference = apiVersion:s=5 kind:s=1 name:s=3 uid:s=4 controller:b=6 blockOwnerDeletion:b=7
LabelSelector = matchLabels:{s}=1 matchExpressions:[LabelSelectorRequirement]=2
LabelSelectorRequirement = key:s=1 operator:s=2 values:[s]=3
Condition = type:s=1 status:s=2 observedGeneration:i=3 lastTransitionTime:t=4 reason:s=5 message:s=6
LocalObjectReference = name:s=1
ObjectReference = kind:s=1 namespace:s=2 name:s=3 uid:s=4 apiVersion:s=5 resourceVersion:s=6 fieldPath:s=7
DeleteOptions = apiVersion:s kind:s gracePeriodSeconds:i=1 preconditions:Preconditions=2 orphanDependents:b=3
 propagationPolicy:s=4 dryRun:[s]=5 ignoreStoreReadErrorWithClusterBreakingPotential:b=6
Preconditions = uid:s=1 resourceVersion:s=2
TypedLocalObjectReference = apiGroup:s=1 kind:s=2 name:s=3
"""

POD = """
Pod = spec:PodSpec=2 status:PodStatus=3
PodTemplateSpec = metadata:ObjectMeta=1 spec:PodSpec=2
PodSpec = volumes:[Volume|name]=1 initContainers:[Container|name]=20 containers:[Container|name]=2
 ephemeralContainers:[EphemeralContainer|name]=34 restartPolicy:s=3 terminationGracePeriodSeconds:i=4
 activeDeadlineSeconds:i=5 dnsPolicy:s=6 nodeSelector:{s}=7 serviceAccountName:s=8 serviceAccount:s=9
 automountServiceAccountToken:b=21 nodeName:s=10 hostNetwork:b=11 hostPID:b=12 hostIPC:b=13 shareProcessNamespace:b=27
 securityContext:PodSecurityContext=14 imagePullSecrets:[LocalObjectReference|name]=15 hostname:s=16 subdomain:s=17
 affinity:Affinity=18 schedulerName:s=19 tolerations:[Toleration]=22 hostAliases:[HostAlias|ip]=23
 priorityClassName:s=24 priority:i=25 dnsConfig:PodDNSConfig=26 readinessGates:[PodReadinessGate]=28
 runtimeClassName:s=29 enableServiceLinks:b=30 preemptionPolicy:s=31 overhead:{q}=32
 topologySpreadConstraints:[TopologySpreadConstraint|topologyKey,whenUnsatisfiable]=33 setHostnameAsFQDN:b=35
 os:PodOS=36 hostUsers:b=37 schedulingGates:[PodSchedulingGate|name]=38 resourceClaims:[any|name]=39
 resources:ResourceRequirements=40 hostnameOverride:s=41 schedulingGroup:any=43
PodOS = name:s=1
PodSchedulingGate = name:s=1
PodReadinessGate = conditionType:s=1
HostAlias = ip:s=1 hostnames:[s]=2
PodDNSConfig = nameservers:[s]=1 searches:[s]=2 options:[PodDNSConfigOption]=3
PodDNSConfigOption = name:s=1 value:s=2
Toleration = key:s=1 operator:s=2 value:s=3 effect:s=4 tolerationSeconds:i=5
TopologySpreadConstraint = maxSkew:i=1 topologyKey:s=2 whenUnsatisfiable:s=3 labelSelector:LabelSelector=4
 minDomains:i=5 nodeAffinityPolicy:s=6 nodeTaintsPolicy:s=7 matchLabelKeys:[s]=8
Affinity = nodeAffinity:NodeAffinity=1 podAffinity:PodAffinity=2 podAntiAffinity:PodAffinity=3
NodeAffinity = requiredDuringSchedulingIgnoredDuringExecution:NodeSelector=1
 preferredDuringSchedulingIgnoredDuringExecution:[PreferredSchedulingTerm]=2
NodeSelector = nodeSelectorTerms:[NodeSelectorTerm]=1
NodeSelectorTerm = matchExpressions:[LabelSelectorRequirement]=1 matchFields:[LabelSelectorRequirement]=2
PreferredSchedulingTerm = weight:i=1 preference:NodeSelectorTerm=2
PodAffinity = requiredDuringSchedulingIgnoredDuringExecution:[PodAffinityTerm]=1
 preferredDuringSchedulingIgnoredDuringExecution:[WeightedPodAffinityTerm]=2
PodAffinityTerm = labelSelector:LabelSelector=1 namespaces:[s]=2 topologyKey:s=3 namespaceSelector:LabelSelector=4
 matchLabelKeys:[s]=5 mismatchLabelKeys:[s]=6
WeightedPodAffinityTerm = weight:i=1 podAffinityTerm:PodAffinityTerm=2
PodSecurityContext = seLinuxOptions:any=1 windowsOptions:any=8 runAsUser:i=2 runAsGroup:i=6 runAsNonRoot:b=3
 supplementalGroups:[i]=4 supplementalGroupsPolicy:s=12 fsGroup:i=5 sysctls:[Sysctl]=7 fsGroupChangePolicy:s=9
 seccompProfile:any=10 appArmorProfile:any=11 seLinuxChangePolicy:s=13
Sysctl = name:s=1 value:s=2
Container = name:s=1 image:s=2 command:[s]=3 args:[s]=4 workingDir:s=5 ports:[ContainerPort|containerPort,protocol]=6
 envFrom:[EnvFromSource]=19 env:[EnvVar|name]=7 resources:ResourceRequirements=8 resizePolicy:[ResizePolicy]=23
 restartPolicy:s=24 restartPolicyRules:[any]=25 volumeMounts:[VolumeMount|mountPath]=9
 volumeDevices:[VolumeDevice|devicePath]=21 livenessProbe:Probe=10 readinessProbe:Probe=11 startupProbe:Probe=22
 lifecycle:Lifecycle=12 terminationMessagePath:s=13 terminationMessagePolicy:s=20 imagePullPolicy:s=14
 securityContext:SecurityContext=15 stdin:b=16 stdinOnce:b=17 tty:b=18
EphemeralContainer = Container:1 targetContainerName:s=2
ContainerPort = name:s=1 hostPort:i=2 containerPort:i=3 protocol:s=4 hostIP:s=5
ResizePolicy = resourceName:s=1 restartPolicy:s=2
EnvFromSource = prefix:s=1 configMapRef:EnvSource=2 secretRef:EnvSource=3
EnvSource = name:s=1.1 optional:b=2
KeyRef = name:s=1.1 key:s=2 optional:b=3
EnvVar = name:s=1 value:s=2 valueFrom:EnvVarSource=3
EnvVarSource = fieldRef:ObjectFieldSelector=1 resourceFieldRef:any=2 configMapKeyRef:KeyRef=3 secretKeyRef:KeyRef=4
 fileKeyRef:any=5
ObjectFieldSelector = apiVersion:s=1 fieldPath:s=2
ResourceRequirements = limits:{q}=1 requests:{q}=2 claims:[any|name]=3
VolumeMount = name:s=1 readOnly:b=2 recursiveReadOnly:s=7 mountPath:s=3 subPath:s=4 mountPropagation:s=5
 subPathExpr:s=6
VolumeDevice = name:s=1 devicePath:s=2
Probe = exec:ExecAction=1.1 httpGet:HTTPGetAction=1.2 tcpSocket:TCPSocketAction=1.3 grpc:GRPCAction=1.4
 initialDelaySeconds:i=2 timeoutSeconds:i=3 periodSeconds:i=4 successThreshold:i=5 failureThreshold:i=6
 terminationGracePeriodSeconds:i=7
ExecAction = command:[s]=1
HTTPGetAction = path:s=1 port:is=2 host:s=3 scheme:s=4 httpHeaders:[HTTPHeader]=5
HTTPHeader = name:s=1 value:s=2
TCPSocketAction = port:is=1 host:s=2
GRPCAction = port:i=1 service:s=2
Lifecycle = postStart:LifecycleHandler=1 preStop:LifecycleHandler=2 stopSignal:s=3
LifecycleHandler = exec:ExecAction=1 httpGet:HTTPGetAction=2 tcpSocket:TCPSocketAction=3 sleep:any=4
SecurityContext = capabilities:Capabilities=1 privileged:b=2 seLinuxOptions:any=3 windowsOptions:any=10 runAsUser:i=4
 runAsGroup:i=8 runAsNonRoot:b=5 readOnlyRootFilesystem:b=6 allowPrivilegeEscalation:b=7 procMount:s=9
 seccompProfile:any=11 appArmorProfile:any=12
Capabilities = add:[s]=1 drop:[s]=2
Volume = name:s=1 hostPath:HostPathVolume=2.1 emptyDir:EmptyDirVolume=2.2 configMap:ConfigMapVolume=2.19
 secret:SecretVolume=2.6 projected:ProjectedVolume=2.26 downwardAPI:DownwardAPIVolume=2.16
 persistentVolumeClaim:any=2.10 csi:any=2.28 nfs:any=2.7 iscsi:any=2.8 ephemeral:any=2.29 image:any=2.30
 glusterfs:any=2.9 rbd:any=2.11 flexVolume:any=2.12 cinder:any=2.13 cephfs:any=2.14 flocker:any=2.15 fc:any=2.17
 azureFile:any=2.18 azureDisk:any=2.22 vsphereVolume:any=2.20 quobyte:any=2.21 photonPersistentDisk:any=2.23
 portworxVolume:any=2.24 scaleIO:any=2.25 storageos:any=2.27 gitRepo:any=2.5 gcePersistentDisk:any=2.3
 awsElasticBlockStore:any=2.4
HostPathVolume = path:s=1 type:s=2
EmptyDirVolume = medium:s=1 sizeLimit:q=2
ConfigMapVolume = name:s=1.1 items:[KeyToPath]=2 defaultMode:i=3 optional:b=4
SecretVolume = secretName:s=1 items:[KeyToPath]=2 defaultMode:i=3 optional:b=4
KeyToPath = key:s=1 path:s=2 mode:i=3
ProjectedVolume = sources:[any]=1 defaultMode:i=2
DownwardAPIVolume = items:[any]=1 defaultMode:i=2
PodStatus = observedGeneration:i=17 phase:s=1 conditions:[PodCondition|type]=2 message:s=3 reason:s=4
 nominatedNodeName:s=11 hostIP:s=5 hostIPs:[HostIP]=16 podIP:s=6 podIPs:[PodIP|ip]=12 startTime:t=7
 initContainerStatuses:[ContainerStatus]=10 containerStatuses:[ContainerStatus]=8 qosClass:s=9
 ephemeralContainerStatuses:[ContainerStatus]=13 resize:s=14 resourceClaimStatuses:[any|name]=15
 extendedResourceClaimStatus:any=18 allocatedResources:{q}=19 resources:ResourceRequirements=20
PodCondition = type:s=1 observedGeneration:i=7 status:s=2 lastProbeTime:t=3 lastTransitionTime:t=4 reason:s=5
 message:s=6
HostIP = ip:s=1
PodIP = ip:s=1
ContainerStatus = name:s=1 state:ContainerState=2 lastState:ContainerState=3 ready:b=4 restartCount:i=5 image:s=6
 imageID:s=7 containerID:s=8 started:b=9 allocatedResources:{q}=10 resources:ResourceRequirements=11
 volumeMounts:[any|mountPath]=12 user:any=13 allocatedResourcesStatus:[any|name]=14 stopSignal:s=15
ContainerState = waiting:ContainerStateWaiting=1 running:ContainerStateRunning=2 terminated:ContainerStateTerminated=3
ContainerStateWaiting = reason:s=1 message:s=2
ContainerStateRunning = startedAt:t=1
ContainerStateTerminated = exitCode:i=1 signal:i=2 reason:s=3 message:s=4 startedAt:t=5 finishedAt:t=6 containerID:s=7
Binding = target:ObjectReference=2
"""

CORE = """
Namespace = spec:NamespaceSpec=2 status:NamespaceStatus=3
NamespaceSpec = finalizers:[s]=1
NamespaceStatus = phase:s=1 conditions:[Condition|type]=2
Node = spec:NodeSpec=2 status:NodeStatus=3
NodeSpec = podCIDR:s=1 podCIDRs:[s|]=7 providerID:s=3 unschedulable:b=4 taints:[Taint]=5 configSource:any=6
 externalID:s=2
Taint = key:s=1 value:s=2 effect:s=3 timeAdded:t=4
NodeStatus = capacity:{q}=1 allocatable:{q}=2 phase:s=3 conditions:[NodeCondition|type]=4
 addresses:[NodeAddress|type]=5 daemonEndpoints:any=6 nodeInfo:any=7 images:[any]=8 volumesInUse:[s]=9
 volumesAttached:[any|name]=10 config:any=11 features:any=13 runtimeHandlers:[any]=12 declaredFeatures:[s]=14
NodeCondition = type:s=1 status:s=2 lastHeartbeatTime:t=3 lastTransitionTime:t=4 reason:s=5 message:s=6
NodeAddress = type:s=1 address:s=2
Service = spec:ServiceSpec=2 status:ServiceStatus=3
ServiceSpec = ports:[ServicePort|port,protocol]=1 selector:{s}=2 clusterIP:s=3 clusterIPs:[s]=18 type:s=4
 externalIPs:[s]=5 sessionAffinity:s=7 loadBalancerIP:s=8 loadBalancerSourceRanges:[s]=9 externalName:s=10
 externalTrafficPolicy:s=11 healthCheckNodePort:i=12 publishNotReadyAddresses:b=13
 sessionAffinityConfig:SessionAffinityConfig=14 ipFamilies:[s]=19 ipFamilyPolicy:s=17
 allocateLoadBalancerNodePorts:b=20 loadBalancerClass:s=21 internalTrafficPolicy:s=22 trafficDistribution:s=23
ServicePort = name:s=1 protocol:s=2 appProtocol:s=6 port:i=3 targetPort:is=4 nodePort:i=5
SessionAffinityConfig = clientIP:ClientIPConfig=1
ClientIPConfig = timeoutSeconds:i=1
ServiceStatus = loadBalancer:LoadBalancerStatus=1 conditions:[Condition|type]=2
LoadBalancerStatus = ingress:[LoadBalancerIngress]=1
LoadBalancerIngress = ip:s=1 hostname:s=2 ipMode:s=3 ports:[any]=4
Endpoints = subsets:[EndpointSubset]=2
EndpointSubset = addresses:[EndpointAddress]=1 notReadyAddresses:[EndpointAddress]=2 ports:[EndpointPort]=3
EndpointAddress = ip:s=1 hostname:s=3 nodeName:s=4 targetRef:ObjectReference=2
EndpointPort = name:s=1 port:i=2 protocol:s=3 appProtocol:s=4
ConfigMap = immutable:b=4 data:{s}=2 binaryData:{B}=3
Secret = immutable:b=5 data:{B}=2 stringData:{s}=4 type:s=3
ServiceAccount = secrets:[ObjectReference|name]=2 imagePullSecrets:[LocalObjectReference]=3
 automountServiceAccountToken:b=4
CoreEvent = involvedObject:ObjectReference=2 reason:s=3 message:s=4 source:EventSource=5 firstTimestamp:t=6
 lastTimestamp:t=7 count:i=8 type:s=9 eventTime:T=10 series:EventSeries=11 action:s=12 related:ObjectReference=13
 reportingComponent:s=14 reportingInstance:s=15
EventSource = component:s=1 host:s=2
EventSeries = count:i=1 lastObservedTime:T=2
Event = eventTime:T=2 series:EventSeries=3 reportingController:s=4 reportingInstance:s=5 action:s=6 reason:s=7
 regarding:ObjectReference=8 related:ObjectReference=9 note:s=10 type:s=11 deprecatedSource:EventSource=12
 deprecatedFirstTimestamp:t=13 deprecatedLastTimestamp:t=14 deprecatedCount:i=15
"""

GROUPS = """
Deployment = spec:DeploymentSpec=2 status:DeploymentStatus=3
DeploymentSpec = replicas:i=1 selector:LabelSelector=2 template:PodTemplateSpec=3 strategy:DeploymentStrategy=4
 minReadySeconds:i=5 revisionHistoryLimit:i=6 paused:b=7 progressDeadlineSeconds:i=9
DeploymentStrategy = type:s=1 rollingUpdate:RollingUpdate=2
RollingUpdate = maxUnavailable:is=1 maxSurge:is=2
DeploymentStatus = observedGeneration:i=1 replicas:i=2 updatedReplicas:i=3 readyReplicas:i=7 availableReplicas:i=4
 unavailableReplicas:i=5 terminatingReplicas:i=9 collisionCount:i=8 conditions:[DeploymentCondition|type]=6
DeploymentCondition = type:s=1 status:s=2 lastUpdateTime:t=6 lastTransitionTime:t=7 reason:s=4 message:s=5
ReplicaSet = spec:ReplicaSetSpec=2 status:ReplicaSetStatus=3
ReplicaSetSpec = replicas:i=1 minReadySeconds:i=4 selector:LabelSelector=2 template:PodTemplateSpec=3
ReplicaSetStatus = replicas:i=1 fullyLabeledReplicas:i=2 readyReplicas:i=4 availableReplicas:i=5
 terminatingReplicas:i=7 observedGeneration:i=3 conditions:[Condition|type]=6
DaemonSet = spec:DaemonSetSpec=2 status:DaemonSetStatus=3
DaemonSetSpec = selector:LabelSelector=1 template:PodTemplateSpec=2 updateStrategy:DeploymentStrategy=3
 minReadySeconds:i=4 revisionHistoryLimit:i=6
DaemonSetStatus = currentNumberScheduled:i=1 numberMisscheduled:i=2 desiredNumberScheduled:i=3 numberReady:i=4
 observedGeneration:i=5 updatedNumberScheduled:i=6 numberAvailable:i=7 numberUnavailable:i=8 collisionCount:i=9
 conditions:[Condition|type]=10
Scale = spec:ScaleSpec=2 status:ScaleStatus=3
ScaleSpec = replicas:i=1
ScaleStatus = replicas:i=1 selector:s=2
EndpointSlice = addressType:s=4 endpoints:[Endpoint]=2 ports:[EndpointPort]=3
Endpoint = addresses:[s|]=1 conditions:EndpointConditions=2 hostname:s=3 targetRef:ObjectReference=4
 deprecatedTopology:{s}=5 nodeName:s=6 zone:s=7 hints:EndpointHints=8
EndpointHints = forZones:[ForName]=1 forNodes:[ForName]=2
ForName = name:s=1
EndpointConditions = ready:b=1 serving:b=2 terminating:b=3
NetworkPolicy = spec:NetworkPolicySpec=2
NetworkPolicySpec = podSelector:LabelSelector=1 ingress:[IngressRule]=2 egress:[EgressRule]=3 policyTypes:[s]=4
IngressRule = ports:[NetworkPolicyPort]=1 from:[NetworkPolicyPeer]=2
EgressRule = ports:[NetworkPolicyPort]=1 to:[NetworkPolicyPeer]=2
NetworkPolicyPort = protocol:s=1 port:is=2 endPort:i=3
NetworkPolicyPeer = podSelector:LabelSelector=1 namespaceSelector:LabelSelector=2 ipBlock:IPBlock=3
IPBlock = cidr:s=1 except:[s]=2
Lease = spec:LeaseSpec=2
LeaseSpec = holderIdentity:s=1 leaseDurationSeconds:i=2 acquireTime:T=3 renewTime:T=4 leaseTransitions:i=5
 strategy:s=6 preferredHolder:s=7
Role = rules:[PolicyRule]=2
ClusterRole = rules:[PolicyRule]=2 aggregationRule:any=3
PolicyRule = verbs:[s]=1 apiGroups:[s]=2 resources:[s]=3 resourceNames:[s]=4 nonResourceURLs:[s]=5
RoleBinding = subjects:[Subject]=2 roleRef:RoleRef=3
ClusterRoleBinding = subjects:[Subject]=2 roleRef:RoleRef=3
Subject = kind:s=1 apiGroup:s=2 name:s=3 namespace:s=4
RoleRef = apiGroup:s=1 kind:s=2 name:s=3
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


Path = tuple[int, ...]


def _parse(text: str) -> tuple[dict[str, dict[str, Type]], dict[str, dict[Path, str]]]:
    types: dict[str, dict[str, Type]] = {}
    wire: dict[str, dict[Path, str]] = {}
    for definition in text.replace("\n ", " ").strip().splitlines():
        name, _, words = definition.partition(" = ")
        fields, numbers = types.setdefault(name, {}), wire.setdefault(name, {})
        for word in words.split():
            key, _, rest = word.partition(":")
            if rest.isdigit():
                fields.update(types[key])
                numbers.update({(int(rest), *path): inner for path, inner in wire[key].items()})
                continue
            kind, _, number = rest.partition("=")
            fields[key] = parse_type(kind)
            if number:
                numbers[tuple(int(part) for part in number.split("."))] = key
    return types, wire


TYPES, WIRE = _parse(META + POD + CORE + GROUPS)
"""The fields of each type, and its field names by protobuf number."""
_TOP = {"apiVersion": Type("s"), "kind": Type("s"), "metadata": Type("ObjectMeta")}
TOP_LEVEL = [
    "Pod",
    "Binding",
    "Namespace",
    "Node",
    "Service",
    "Endpoints",
    "ConfigMap",
    "Secret",
    "ServiceAccount",
    "CoreEvent",
    "Event",
    "Deployment",
    "ReplicaSet",
    "DaemonSet",
    "Scale",
    "EndpointSlice",
    "NetworkPolicy",
    "Lease",
    "Role",
    "ClusterRole",
    "RoleBinding",
    "ClusterRoleBinding",
    "CustomResourceDefinition",
]
for _name in TOP_LEVEL:
    TYPES[_name] = _TOP | TYPES[_name]
    if WIRE[_name]:
        WIRE[_name][(1,)] = "metadata"
TYPES["CustomObject"] = dict(_TOP)
