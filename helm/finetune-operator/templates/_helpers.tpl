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

{{- define "finetune-operator.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{ include "finetune-operator.selectorLabels" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: finetune-operator
{{- end -}}

{{- define "finetune-operator.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "finetune-operator.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* Image reference from {repository, tag, digest}. If the digest is set, the tag is ignored. */}}
{{- define "finetune-operator.image" -}}
{{- if .digest -}}
{{- printf "%s@%s" .repository .digest -}}
{{- else -}}
{{- printf "%s:%s" .repository .tag -}}
{{- end -}}
{{- end -}}

{{/* The operator's configuration file, with the operator's key names. Empty values of the chart are omitted. */}}
{{- define "finetune-operator.config" -}}
{{- $trainer := dict "image" (include "finetune-operator.image" .Values.trainer.image) "imagePullPolicy" .Values.trainer.image.pullPolicy -}}
{{- range $key := list "imagePullSecrets" "serviceAccountName" "priorityClassName" "env" "labels" "annotations" -}}
{{- with index $.Values.trainer $key -}}
{{- $_ := set $trainer $key . -}}
{{- end -}}
{{- end -}}
{{- $config := deepCopy .Values.settings -}}
{{- $_ := set $config "trainer" $trainer -}}
{{- $_ := set $config "resources" .Values.trainer.resources -}}
{{- $_ := set $config "leaderElection" (mergeOverwrite (dict "leaseName" (include "finetune-operator.fullname" .)) .Values.leaderElection) -}}
{{- $_ := set $config "log" .Values.log -}}
{{- with .Values.watchNamespaces -}}{{- $_ := set $config "namespaces" . -}}{{- end -}}
{{- with .Values.storage -}}{{- $_ := set $config "storage" . -}}{{- end -}}
{{- with .Values.nodePools -}}{{- $_ := set $config "nodePools" . -}}{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* Permissions of the operator in the namespaces of FineTuneJobs. They contain no wildcards and do not include Secrets. */}}
{{- define "finetune-operator.rules" -}}
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
  # If a quota or Pod Security rejects a pod, only an event of the Job controller reports it.
  resources: [events]
  verbs: [list]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [get, create, patch]
{{- end -}}
