{{/* Labels of everything that this release makes. */}}
{{- define "fimbria.labels" -}}
app.kubernetes.io/part-of: fimbria
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name (.Chart.Version | replace "+" "_") }}
{{- end -}}

{{/* Labels that select the agents' pods. They can't change: a DaemonSet's selector is immutable. */}}
{{- define "fimbria.agent.selector" -}}
k8s-app: fimbria
{{- end -}}

{{- define "fimbria.operator.selector" -}}
k8s-app: fimbria-operator
{{- end -}}

{{- define "fimbria.image" -}}
{{- with .Values.image -}}
{{- if .digest -}}{{ .repository }}@{{ .digest }}{{- else -}}{{ .repository }}:{{ .tag | default $.Chart.AppVersion }}{{- end -}}
{{- end -}}
{{- end -}}

{{/* Helm adds the default's rollingUpdate to other types, with which the API server refuses it. */}}
{{- define "fimbria.strategy" -}}
{{- if eq .type "RollingUpdate" -}}{{ toYaml . }}{{- else -}}{{ toYaml (omit . "rollingUpdate") }}{{- end -}}
{{- end -}}

{{/* How to reach the API server: these variables win over those that kubelet sets for the Service. */}}
{{- define "fimbria.apiServer" -}}
{{- if .Values.k8sServiceHost -}}
- name: KUBERNETES_SERVICE_HOST
  value: {{ .Values.k8sServiceHost | quote }}
- name: KUBERNETES_SERVICE_PORT
  value: {{ .Values.k8sServicePort | quote }}
{{- end -}}
{{- end -}}

{{/* A service account's token for one container instead of for all of a pod: it expires, and is bound to the pod. */}}
{{- define "fimbria.tokenVolume" -}}
- name: service-account
  projected:
    defaultMode: 0440
    sources:
      - serviceAccountToken:
          path: token
          expirationSeconds: 3607
      - configMap:
          name: kube-root-ca.crt
          items:
            - key: ca.crt
              path: ca.crt
      - downwardAPI:
          items:
            - path: namespace
              fieldRef:
                fieldPath: metadata.namespace
{{- end -}}

{{- define "fimbria.tokenMount" -}}
- name: service-account
  mountPath: /var/run/secrets/kubernetes.io/serviceaccount
  readOnly: true
{{- end -}}

{{/* Arguments, sorted, out of a dict of settings: true and false are switches, all else is text. Call with a dict. */}}
{{- define "fimbria.arguments" -}}
{{- range $name, $value := . }}
{{- if kindIs "bool" $value }}
- --{{ if not $value }}no-{{ end }}{{ $name }}
{{- else if kindIs "float64" $value }}
{{- /* Numbers of YAML are floats: without this a million would be 1e+06. */}}
- {{ if eq $value (floor $value) }}{{ printf "--%s=%d" $name (int64 $value) | quote }}{{ else }}{{ printf "--%s=%v" $name $value | quote }}{{ end }}
{{- else }}
- {{ printf "--%s=%v" $name $value | quote }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "fimbria.agent.arguments" -}}
{{- $v := .Values -}}
{{- $settings := dict
  "routing" (eq $v.routingMode "tunnel" | ternary "overlay" "native")
  "overlay-port" $v.tunnelPort
  "mtu" $v.MTU
  "devices" (join "," $v.devices)
  "masquerade" $v.masquerade.enabled
  "masquerade-ports" $v.masquerade.ports
  "cluster-name" $v.cluster.name
  "label-filter" $v.labels
  "identity-allocation" $v.identityManagementMode
  "endpoint-slices" $v.ciliumEndpointSlice.enabled
  "forwarding" $v.loadBalancer.mode
  "load-balancing" $v.loadBalancer.algorithm
  "xdp" $v.loadBalancer.acceleration
  "maglev-table-size" $v.maglev.tableSize
  "socket-services" ($v.socketLB.enabled | ternary ($v.socketLB.hostNamespaceOnly | ternary "host" "all") "off")
  "node-ports" $v.nodePort.range
  "healthz-listen" $v.kubeProxyReplacementHealthzBindAddr
  "map-memory-ratio" $v.bpf.mapDynamicSizeRatio
  "bpffs" $v.bpf.root
  "cgroup" $v.cgroup.hostRoot
  "procfs" "/host/proc"
  "cni-conf-dir" ($v.cni.install | ternary $v.cni.confPath "")
  "cni-bin-dir" ""
  "cni-exclusive" $v.cni.exclusive
  "probe-listen" (printf "127.0.0.1:%d" (int $v.healthPort))
  "metrics-listen" ($v.prometheus.enabled | ternary (printf ":%d" (int $v.prometheus.port)) "")
  "log-level" $v.logLevel
-}}
{{- include "fimbria.arguments" (merge (deepCopy $v.extraConfig) $settings) -}}
{{- end -}}

{{- define "fimbria.operator.arguments" -}}
{{- $v := .Values -}}
{{- $pools := $v.ipam.operator -}}
{{- $settings := dict
  "leader-elect" true
  "namespace" .Release.Namespace
  "cluster-name" $v.cluster.name
  "label-filter" $v.labels
  "identity-allocation" $v.identityManagementMode
  "endpoint-slices" $v.ciliumEndpointSlice.enabled
  "ipv4-pool" ($v.ipv4.enabled | ternary (join "," $pools.clusterPoolIPv4PodCIDRList) "")
  "ipv4-mask" $pools.clusterPoolIPv4MaskSize
  "ipv6-pool" ($v.ipv6.enabled | ternary (join "," $pools.clusterPoolIPv6PodCIDRList) "")
  "ipv6-mask" $pools.clusterPoolIPv6MaskSize
  "healthz-listen" (printf "127.0.0.1:%d" (int $v.operator.healthPort))
  "metrics-listen" ($v.operator.prometheus.enabled | ternary (printf ":%d" (int $v.operator.prometheus.port)) "")
  "agent-taint" $v.agentNotReadyTaintKey
  "remove-taints" $v.operator.removeNodeTaints
  "set-taints" $v.operator.setNodeTaints
  "set-network-status" $v.operator.setNodeNetworkStatus
  "log-level" $v.logLevel
-}}
{{- include "fimbria.arguments" (merge (deepCopy $v.operator.extraConfig) $settings) -}}
{{- end -}}
