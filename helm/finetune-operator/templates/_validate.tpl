{{/* Refuse values that contradict each other. values.schema.json already refuses wrong types, unknown keys and wrong quantities. */}}
{{- define "finetune-operator.validate" -}}
{{- $values := .Values -}}
{{- if and (gt (int .Values.replicas) 1) (not .Values.leaderElection.enabled) -}}
{{- fail "replicas is more than 1 and leaderElection.enabled is false: two active operators would interfere with each other: set leaderElection.enabled to true, or replicas to 1" -}}
{{- end -}}
{{- $lease := mergeOverwrite (dict "leaseDurationSeconds" 15 "renewDeadlineSeconds" 10 "retryPeriodSeconds" 2) (deepCopy .Values.leaderElection) -}}
{{- if not (and (gt (float64 $lease.leaseDurationSeconds) (float64 $lease.renewDeadlineSeconds)) (gt (float64 $lease.renewDeadlineSeconds) (float64 $lease.retryPeriodSeconds))) -}}
{{- fail (printf "leaderElection has leaseDurationSeconds %v, renewDeadlineSeconds %v and retryPeriodSeconds %v: leaseDurationSeconds must exceed renewDeadlineSeconds, and renewDeadlineSeconds must exceed retryPeriodSeconds" $lease.leaseDurationSeconds $lease.renewDeadlineSeconds $lease.retryPeriodSeconds) -}}
{{- end -}}
{{- if and .Values.rbac.create (not .Values.serviceAccount.create) (not .Values.serviceAccount.name) -}}
{{- fail "serviceAccount.create is false and serviceAccount.name is empty: the ServiceAccount `default` would get the operator's permissions, and with it every pod of the namespace: write serviceAccount.name" -}}
{{- end -}}
{{- with .Values.isolation -}}
{{- if and (not .networkPolicy) (or .blockMetadata .blockedCidrs .metricsFrom) -}}
{{- fail "isolation.networkPolicy is false, so isolation.blockMetadata, isolation.blockedCidrs and isolation.metricsFrom have no effect: set isolation.networkPolicy to true, or remove them" -}}
{{- end -}}
{{- end -}}
{{- with .Values.modelCache -}}
{{- if and (eq .default "node") (or (not .node.path) (not .node.namespaces)) -}}
{{- fail "modelCache.default is node, but modelCache.node.path or modelCache.node.namespaces is empty: write both, or remove modelCache.default" -}}
{{- end -}}
{{- if ne (empty .node.path) (empty .node.namespaces) -}}
{{- fail "modelCache.node.path and modelCache.node.namespaces only have an effect together: write both, or remove both" -}}
{{- end -}}
{{- end -}}
{{- include "finetune-operator.validatePools" . -}}
{{- include "finetune-operator.validatePod" . -}}
{{- include "finetune-operator.validateDisruptionBudget" . -}}
{{- include "finetune-operator.validateMetrics" . -}}
{{- if .Values.openaiServer.enabled -}}
{{- include "finetune-operator.validateOpenaiServer" . -}}
{{- end -}}
{{- if .Values.checkOtherReleases -}}
{{- include "finetune-operator.validateOtherReleases" . -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.validatePools" -}}
{{- $names := list -}}
{{- $defaults := list -}}
{{- range .Values.nodePools -}}
{{- if has .name $names -}}
{{- fail (printf "nodePools contains %s more than once: use different names" .name) -}}
{{- end -}}
{{- $names = append $names .name -}}
{{- if .default -}}{{- $defaults = append $defaults .name -}}{{- end -}}
{{- end -}}
{{- if gt (len $defaults) 1 -}}
{{- fail (printf "nodePools marks %s as default: mark only one pool" (join " and " $defaults)) -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.validatePod" -}}
{{- range .Values.extraEnv -}}
{{- if has .name (list "POD_NAME" "POD_NAMESPACE") -}}
{{- fail (printf "extraEnv contains %s, which the chart sets: remove it" .name) -}}
{{- end -}}
{{- end -}}
{{- range .Values.extraVolumes -}}
{{- if has .name (list "config" "tmp") -}}
{{- fail (printf "extraVolumes contains the name %s, which the chart uses: write another name" .name) -}}
{{- end -}}
{{- end -}}
{{- if .Values.openshift -}}
{{- range $field := list "runAsUser" "runAsGroup" "fsGroup" -}}
{{- with index $.Values.podSecurityContext $field -}}
{{- if ne (int .) 10001 -}}
{{- fail (printf "podSecurityContext.%s is %v and openshift is true: OpenShift assigns the ids itself: remove podSecurityContext.%s, or set openshift to false" $field . $field) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.validateOpenaiServer" -}}
{{- $server := .Values.openaiServer -}}
{{- $storage := $server.storage | default .Values.storage -}}
{{- if not (hasPrefix "s3://" ($storage.uri | default "")) -}}
{{- fail "openaiServer.enabled is true, but neither openaiServer.storage.uri nor storage.uri is an S3 address, so files of clients could not be stored: write s3://bucket/prefix" -}}
{{- end -}}
{{- range $field, $instead := dict "encryption" "set the default encryption of the bucket" "caBundleRef" "write an endpoint whose certificate a public CA has signed" -}}
{{- if index $storage $field -}}
{{- fail (printf "%s.%s is set, but the OpenAI server cannot use this field when it writes the files of clients: %s, and write openaiServer.storage without %s" (ternary "openaiServer.storage" "storage" (not (empty $server.storage))) $field $instead $field) -}}
{{- end -}}
{{- end -}}
{{- if not $server.models -}}
{{- fail "openaiServer.enabled is true and openaiServer.models is empty: write the name of each model and its spec" -}}
{{- end -}}
{{- if not $server.keysSecret -}}
{{- fail "openaiServer.enabled is true and openaiServer.keysSecret is empty: write the name of the Secret with the table of API keys" -}}
{{- end -}}
{{- if not $server.accounts -}}
{{- fail "openaiServer.enabled is true and openaiServer.accounts is empty, so the server could act as no ServiceAccount: write the ServiceAccounts of the table of API keys" -}}
{{- end -}}
{{- $namespaces := list -}}
{{- range $server.accounts -}}
{{- if has .namespace $namespaces -}}
{{- fail (printf "openaiServer.accounts contains the namespace %s more than once: write all its ServiceAccounts into one entry" .namespace) -}}
{{- end -}}
{{- $namespaces = append $namespaces .namespace -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.validateDisruptionBudget" -}}
{{- $budget := .Values.podDisruptionBudget -}}
{{- $hasMinimum := ne (toString $budget.minAvailable) "" -}}
{{- $hasMaximum := ne (toString $budget.maxUnavailable) "" -}}
{{- if and $hasMinimum $hasMaximum -}}
{{- fail "podDisruptionBudget has minAvailable and maxUnavailable, but Kubernetes accepts only one of them: remove one" -}}
{{- end -}}
{{- if and $budget.enabled $hasMinimum -}}
{{- if or (eq (toString $budget.minAvailable) "100%") (and (not (hasSuffix "%" (toString $budget.minAvailable))) (ge (int $budget.minAvailable) (int .Values.replicas))) -}}
{{- fail (printf "podDisruptionBudget.minAvailable is %v and replicas is %v, so no node with an operator pod could be drained: lower minAvailable, or raise replicas" $budget.minAvailable .Values.replicas) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.validateMetrics" -}}
{{- $metrics := .Values.metrics -}}
{{- if and $metrics.serviceMonitor.enabled $metrics.podMonitor.enabled -}}
{{- fail "metrics.serviceMonitor.enabled and metrics.podMonitor.enabled are both true, so Prometheus would count everything twice: enable only one" -}}
{{- end -}}
{{- if and $metrics.serviceMonitor.enabled (not $metrics.service.enabled) -}}
{{- fail "metrics.serviceMonitor.enabled is true, but the ServiceMonitor selects the Service, and metrics.service.enabled is false: enable the Service, or use metrics.podMonitor" -}}
{{- end -}}
{{- $known := list -}}
{{- range (.Files.Get "files/alerts.yaml" | fromYaml).rules -}}{{- $known = append $known .alert -}}{{- end -}}
{{- range $metrics.prometheusRule.disabledAlerts -}}
{{- if not (has . $known) -}}
{{- fail (printf "metrics.prometheusRule.disabledAlerts contains %s, but the chart has no such alert: write one of %s" . (join ", " $known)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/*
Fail if another release manages one of this release's namespaces. The other release is found by its role, which may write the status of FineTuneJobs.
Without a connection to a cluster (`helm template`), `lookup` returns nothing, so nothing is checked.
*/}}
{{- define "finetune-operator.validateOtherReleases" -}}
{{- range (lookup "rbac.authorization.k8s.io/v1" "ClusterRole" "" "").items -}}
{{- include "finetune-operator.refuseOtherRelease" (dict "root" $ "role" . "scope" "all namespaces") -}}
{{- end -}}
{{- range (.Values.watchNamespaces | default (list "")) -}}
{{- range (lookup "rbac.authorization.k8s.io/v1" "Role" . "").items -}}
{{- include "finetune-operator.refuseOtherRelease" (dict "root" $ "role" . "scope" (printf "namespace %s" .metadata.namespace)) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "finetune-operator.refuseOtherRelease" -}}
{{- $annotations := .role.metadata.annotations | default dict -}}
{{- $release := index $annotations "meta.helm.sh/release-name" | default "" -}}
{{- $namespace := index $annotations "meta.helm.sh/release-namespace" | default "" -}}
{{- $isOther := and $release (or (ne $release .root.Release.Name) (ne $namespace .root.Release.Namespace)) -}}
{{- range .role.rules -}}
{{- if and $isOther (has "finetunejobs/status" (.resources | default list)) (has "update" .verbs) -}}
{{- fail (printf "release %s in namespace %s already manages the FineTuneJobs of %s, and two operators would both create Jobs: set watchNamespaces of both releases to different namespaces, or uninstall one release" $release $namespace $.scope) -}}
{{- end -}}
{{- end -}}
{{- end -}}
