{{- define "finetune-operator.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "finetune-operator.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else if contains (include "finetune-operator.name" .) .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "finetune-operator.name" .) | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.selectorLabels" -}}
app.kubernetes.io/name: {{ include "finetune-operator.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of the pod of `helm test`. They differ from the selector's labels, so that the Service does not select this pod. */}}
{{- define "finetune-operator.testLabels" -}}
app.kubernetes.io/name: {{ printf "%s-test" (include "finetune-operator.name" . | trunc 58) }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of the pods of the OpenAI server. They differ from the labels of the operator's pods, so that the operator's Service does not select them. */}}
{{- define "finetune-operator.openaiSelectorLabels" -}}
app.kubernetes.io/name: {{ printf "%s-openai" (include "finetune-operator.name" . | trunc 56) }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Labels of the objects of the OpenAI server. They lack `part-of`, because `finetune doctor` finds the operator's configuration by this label. */}}
{{- define "finetune-operator.openaiLabels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "finetune-operator.openaiSelectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "finetune-operator.openaiName" -}}
{{- printf "%s-openai" (include "finetune-operator.fullname" . | trunc 56 | trimSuffix "-") -}}
{{- end -}}

{{/* The configuration file of the OpenAI server. */}}
{{- define "finetune-operator.openaiConfig" -}}
{{- $server := .Values.openaiServer -}}
{{- toYaml (dict "storage" ($server.storage | default .Values.storage) "models" $server.models "maxFileBytes" (int64 $server.maxFileBytes)) -}}
{{- end -}}

{{- define "finetune-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: finetune-operator
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "finetune-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Return an image reference. Arguments: the chart's context `root`, `image` {repository, tag, digest}, and `path`, the path of `image` in the values. */}}
{{- define "finetune-operator.image" -}}
{{- $registry := .root.Values.imageRegistry | trimSuffix "/" -}}
{{- $name := .image.repository -}}
{{- if contains "/" $name -}}
{{- else if $registry -}}
{{- $name = printf "%s/%s" $registry $name -}}
{{- else -}}
{{- fail (printf "imageRegistry is empty and %s.repository (%s) names no registry, so nodes cannot pull the image: push the images to a registry, and write imageRegistry, for example registry.example.com/ml" .path $name) -}}
{{- end -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.operatorImage" -}}
{{- include "finetune-operator.image" (dict "root" . "image" .Values.image "path" "image") -}}
{{- end -}}

{{- define "finetune-operator.podSecurityContext" -}}
{{- $context := .Values.podSecurityContext -}}
{{- if .Values.openshift -}}
{{- $context = omit $context "runAsUser" "runAsGroup" "fsGroup" -}}
{{- end -}}
{{- toYaml $context -}}
{{- end -}}

{{/* Fields of a pod's spec that decide where it runs, for the operator's pods and the pod of `helm test`. */}}
{{- define "finetune-operator.placement" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- range $field := list "priorityClassName" "runtimeClassName" }}
{{- with index $.Values $field }}
{{ $field }}: {{ . }}
{{- end }}
{{- end }}
{{- range $field := list "nodeSelector" "tolerations" "affinity" }}
{{- with index $.Values $field }}
{{ $field }}:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
{{- end -}}

{{/* Metadata of a monitoring object. Its namespace is the one in its values or, by default, the namespace of the release. */}}
{{- define "finetune-operator.monitoringMetadata" -}}
namespace: {{ .object.namespace | default .root.Release.Namespace }}
labels:
  {{- include "finetune-operator.labels" .root | nindent 2 }}
  {{- with .object.labels }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
{{- end -}}

{{/* The scraped endpoint in a ServiceMonitor or PodMonitor. */}}
{{- define "finetune-operator.monitorEndpoint" -}}
port: http
path: /metrics
{{- range $field := list "interval" "scrapeTimeout" "relabelings" "metricRelabelings" }}
{{- with index $ $field }}
{{ $field }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The section `isolation` of the operator's configuration: the chart's values, and the namespace and labels of the operator's pods. */}}
{{- define "finetune-operator.isolation" -}}
{{- $isolation := .Values.isolation -}}
secret: {{ $isolation.secret }}
keySecretName: {{ include "finetune-operator.fullname" . }}-attempt-key
networkPolicy: {{ $isolation.networkPolicy }}
operatorNamespace: {{ .Release.Namespace }}
operatorLabels: {{ include "finetune-operator.selectorLabels" . | fromYaml | toJson }}
{{- range $key := list "metricsFrom" "blockMetadata" "blockedCidrs" }}
{{- with index $isolation $key }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The section `modelCache` of the operator's configuration. Empty values of the chart are omitted. */}}
{{- define "finetune-operator.modelCache" -}}
{{- $node := dict "sizeLimit" .Values.modelCache.node.sizeLimit "namespaces" .Values.modelCache.node.namespaces -}}
{{- with .Values.modelCache.node.path -}}{{- $_ := set $node "path" . -}}{{- end -}}
{{- $cache := dict "node" $node -}}
{{- with .Values.modelCache.default -}}{{- $_ := set $cache "default" . -}}{{- end -}}
{{- toYaml $cache -}}
{{- end -}}

{{/* The operator's configuration file. Its keys are those of the operator, not those of the chart. Empty values of the chart are omitted. */}}
{{- define "finetune-operator.config" -}}
{{- $trainer := dict "image" (include "finetune-operator.image" (dict "root" . "image" .Values.trainer.image "path" "trainer.image")) "imagePullPolicy" .Values.trainer.image.pullPolicy -}}
{{- range $key := list "generationImage" "imagePullSecrets" "serviceAccountName" "priorityClassName" "env" "labels" "annotations" -}}
{{- with index $.Values.trainer $key -}}
{{- $_ := set $trainer $key . -}}
{{- end -}}
{{- end -}}
{{- if .Values.openshift -}}{{- $_ := set $trainer "fixedUser" false -}}{{- end -}}
{{- $config := deepCopy .Values.settings -}}
{{- $_ := set $config "trainer" $trainer -}}
{{- with .Values.trainer.resources -}}{{- $_ := set $config "resources" . -}}{{- end -}}
{{- $_ := set $config "leaderElection" (mergeOverwrite (dict "leaseName" (include "finetune-operator.fullname" .)) .Values.leaderElection) -}}
{{- $_ := set $config "isolation" (include "finetune-operator.isolation" . | fromYaml) -}}
{{- $_ := set $config "log" .Values.log -}}
{{- with .Values.watchNamespaces -}}{{- $_ := set $config "namespaces" . -}}{{- end -}}
{{- with .Values.storage -}}{{- $_ := set $config "storage" . -}}{{- end -}}
{{- $_ := set $config "prepare" .Values.prepare -}}
{{- $_ := set $config "modelCache" (include "finetune-operator.modelCache" . | fromYaml) -}}
{{- with .Values.nodePools -}}{{- $_ := set $config "nodePools" . -}}{{- end -}}
{{- $_ := set $config "policy" (omit .Values.policy "validatingAdmissionPolicy") -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Permissions of the operator in the namespaces of FineTuneJobs. They contain no wildcards, and no permission to read Secrets. */}}
{{- define "finetune-operator.rbacRules" -}}
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs]
  verbs: [get, list, watch]
- apiGroups: [finetune-operator.io]
  resources: [finetunejobs/status]
  verbs: [update]
- apiGroups: [finetune-operator.io]
  # The admission plugin OwnerReferencesPermissionEnforcement requires this permission to set blockOwnerDeletion in owner references.
  resources: [finetunejobs/finalizers]
  verbs: [update]
- apiGroups: [batch]
  resources: [jobs]
  verbs: [get, list, watch, create, delete]
- apiGroups: [""]
  # The operator deletes pods without a Job, and force-deletes (grace period 0) pods on lost nodes.
  resources: [pods]
  verbs: [list, watch, delete]
- apiGroups: [""]
  # The operator does not need the verb `delete`: garbage collection deletes a Service after its owner, the Job.
  resources: [services]
  verbs: [get, create]
- apiGroups: [""]
  # If a quota or Pod Security rejects a pod, only an event of the Job controller shows it.
  resources: [events]
  verbs: [list]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [get, create, patch]
{{- if .isolation.secret }}
- apiGroups: [""]
  # The operator creates a Secret for each attempt. It derives the content from its own key, so it need not read the Secret.
  resources: [secrets]
  verbs: [create]
{{- end }}
{{- if .isolation.networkPolicy }}
- apiGroups: [networking.k8s.io]
  resources: [networkpolicies]
  verbs: [get, create]
{{- end }}
{{- end -}}

{{/* Egress rules for the API server and DNS, which every NetworkPolicy of the chart contains. */}}
{{- define "finetune-operator.apiServerEgress" -}}
# The API server.
- ports:
    {{- range .Values.networkPolicy.apiServerPorts }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
  {{- with .Values.networkPolicy.apiServerCidrs }}
  to:
    {{- range . }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  {{- end }}
# DNS.
- ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end -}}
