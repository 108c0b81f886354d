{{/* What cannot work, and no schema can say. */}}

{{- define "afd.check" -}}
{{- $v := .Values -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .Release.Name) -}}
{{- fail (printf "release name %q: Services are named after it, so it must begin with a lower-case letter and hold only lower-case letters, digits and -" .Release.Name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$" .Release.Namespace) -}}
{{- fail (printf "namespace %q: it may hold only lower-case letters, digits and -, at most 63, and neither begin nor end with -" .Release.Namespace) -}}
{{- end -}}
{{- include "afd.checkPods" . -}}
{{- include "afd.checkWorkers" . -}}
{{- include "afd.checkScaling" . -}}
{{- include "afd.checkUpgrade" . -}}
{{- if and $v.tls.enabled (not $v.tls.secretName) -}}
{{- fail "tls.enabled needs tls.secretName: a Secret with tls.crt, tls.key and ca.crt" -}}
{{- end -}}
{{- if and $v.apiKeys (not $v.secret.existingSecret) -}}
{{- fail "apiKeys needs secret.existingSecret: a Secret with the keys cluster-secret and api-keys" -}}
{{- end -}}
{{- if and $v.gateway.ingress.enabled (not $v.gateway.ingress.host) -}}
{{- fail "gateway.ingress.enabled needs gateway.ingress.host" -}}
{{- end -}}
{{- if and $v.gateway.httpRoute.enabled (not $v.gateway.httpRoute.parentRefs) -}}
{{- fail "gateway.httpRoute.enabled needs gateway.httpRoute.parentRefs" -}}
{{- end -}}
{{- if and $v.gateway.inferencePool.enabled (not $v.gateway.inferencePool.endpointPicker) -}}
{{- fail "gateway.inferencePool.enabled needs gateway.inferencePool.endpointPicker: the Service of the endpoint picker" -}}
{{- end -}}
{{- with $v.networkPolicy -}}
{{- if and .enabled .clientsFrom (not .metricsFrom) -}}
{{- fail "networkPolicy.clientsFrom closes the gateway's port to everyone else, and its metrics are on that port: name who scrapes them in networkPolicy.metricsFrom" -}}
{{- end -}}
{{- if and .enabled .egress $v.model.download.image (not .egressTo) -}}
{{- fail "model.download needs a way out of the pods: name it in networkPolicy.egressTo, or set networkPolicy.egress to false" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* What Kubernetes would refuse of a pod, only once the pod is to be made. */}}
{{- define "afd.checkPods" -}}
{{- range $role := list "gateway" "coordinator" "attention" "ffn" "autoscale" -}}
{{- $own := include "afd.role" (list $ $role) | fromJson -}}
{{- $taken := dict
  "env" (list "POD_IP" "HOME" "AFD_RANK")
  "extraVolumes" (list "config" "secret" "scratch" "tls" "shm" "model")
  "extraVolumeMounts" (list "/etc/afd/config" "/etc/afd/secret" "/etc/afd/tls" "/tmp" "/dev/shm" $.Values.model.mountPath)
  "initContainers" (list $role "download" "doctor")
  "extraContainers" (list $role "download" "doctor")
  "resourceClaims" list
  "topologySpreadConstraints" list
-}}
{{- $volumes := $taken.extraVolumes -}}
{{- range $key, $names := $taken -}}
{{- range get $own $key -}}
{{- $name := include "afd.itemName" . -}}
{{- if has $name $names -}}
{{- fail (printf "%s.%s (with pods.%s): there are two of %s; some are the chart's own: %s" $role $key $key $name (join ", " (get $taken $key))) -}}
{{- end -}}
{{- $names = append $names $name -}}
{{- end -}}
{{- if eq $key "extraVolumes" -}}
{{- $volumes = $names -}}
{{- end -}}
{{- end -}}
{{- range $own.extraVolumeMounts -}}
{{- if not (has .name $volumes) -}}
{{- fail (printf "%s.extraVolumeMounts: no volume is called %s; extraVolumes say what it is" $role .name) -}}
{{- end -}}
{{- end -}}
{{- include "afd.checkResources" (list (printf "%s.resources" $role) $own.resources) -}}
{{- end -}}
{{- include "afd.checkResources" (list "model.download.resources" .Values.model.download.resources) -}}
{{- end -}}

{{- define "afd.checkResources" -}}
{{- $resources := index . 1 -}}
{{- range $name, $limit := $resources.limits -}}
{{- $request := get $resources.requests $name | default 0 -}}
{{- if gt (include "afd.quantity" $request | float64) (include "afd.quantity" $limit | float64) -}}
{{- fail (printf "%s: the request of %s, %v, is above the limit, %v" (index $ 0) $name $request $limit) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "afd.checkWorkers" -}}
{{- $v := .Values -}}
{{- $hostNetwork := list -}}
{{- range $role := list "attention" "ffn" -}}
{{- if (include "afd.workerValue" (list $ $role "hostNetwork") | fromJson).value -}}
{{- $hostNetwork = append $hostNetwork $role -}}
{{- end -}}
{{- end -}}
{{- if and $hostNetwork $v.networkPolicy.enabled -}}
{{- fail "hostNetwork pods are outside NetworkPolicies: set networkPolicy.enabled to false with hostNetwork" -}}
{{- end -}}
{{- if and (eq $v.transport "shm") (lt (len $hostNetwork) 2) -}}
{{- fail "transport shm needs hostNetwork for attention and ffn: pods with a network of their own share no memory" -}}
{{- end -}}
{{- if and (eq $v.transport "verbs") (not $v.rdma.enabled) -}}
{{- fail "transport verbs needs rdma.enabled: without its devices no pod has RDMA" -}}
{{- end -}}
{{- if and (eq $v.dispatch "sparse") (eq $v.ffnParallel "tp") -}}
{{- fail "dispatch sparse leaves out no row with ffnParallel tp: every FFN worker has a slice of every expert" -}}
{{- end -}}
{{- if and (hasPrefix "/" $v.model.name) (not (hasPrefix (printf "%s/" (trimSuffix "/" $v.model.mountPath)) $v.model.name)) -}}
{{- fail (printf "model.name %s is not under model.mountPath %s, where the pods have the model's files" $v.model.name $v.model.mountPath) -}}
{{- end -}}
{{- if and (hasPrefix "/" $v.model.name) (not $v.model.volume) -}}
{{- fail (printf "model.name %s lies under model.mountPath: model.volume says where the files come from" $v.model.name) -}}
{{- end -}}
{{- if and $v.model.volume.image (semverCompare "<1.33.0-0" .Capabilities.KubeVersion.Version) -}}
{{- fail (printf "model.volume.image needs Kubernetes 1.33, and this is %s: use a PersistentVolumeClaim" .Capabilities.KubeVersion.Version) -}}
{{- end -}}
{{- if and $v.model.download.image (or (not $v.model.volume) $v.model.volume.image) -}}
{{- fail "model.download needs a model.volume that it can write to: pvc, hostPath or emptyDir" -}}
{{- end -}}
{{- if and (hasKey $v.model.volume "emptyDir") (not $v.model.download.image) -}}
{{- fail "model.volume.emptyDir is empty: model.download says what fills it" -}}
{{- end -}}
{{- if eq (include "afd.workerValue" (list . "attention" "device") | fromJson).value "cpu" -}}
{{- if ge (mulf $v.attention.kvCacheGiB 1073741824) (include "afd.quantity" $v.attention.resources.limits.memory | float64) -}}
{{- fail (printf "attention.kvCacheGiB %v does not fit the memory limit of an attention worker, %v, which also holds its half of the model" $v.attention.kvCacheGiB $v.attention.resources.limits.memory) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{- define "afd.checkScaling" -}}
{{- $v := .Values -}}
{{- $x := include "afd.numAttention" . | int -}}
{{- $y := include "afd.numFfn" . | int -}}
{{- $apply := and $v.autoscale.enabled (eq $v.autoscale.mode "apply") -}}
{{- if $v.autoscale.enabled -}}
{{- $minX := regexReplaceAll "A.*" $v.autoscale.min "" | int -}}
{{- $maxX := regexReplaceAll "A.*" $v.autoscale.max "" | int -}}
{{- $minY := regexReplaceAll ".*A([0-9]+)F" $v.autoscale.min "${1}" | int -}}
{{- $maxY := regexReplaceAll ".*A([0-9]+)F" $v.autoscale.max "${1}" | int -}}
{{- if or (gt $minX $maxX) (gt $minY $maxY) -}}
{{- fail (printf "autoscale.min %s exceeds autoscale.max %s" $v.autoscale.min $v.autoscale.max) -}}
{{- end -}}
{{- if or (gt $x $maxX) (gt $y $maxY) -}}
{{- fail (printf "autoscale.max %s is below topology %s" $v.autoscale.max $v.topology) -}}
{{- end -}}
{{- if gt $minY $y -}}
{{- fail (printf "autoscale.min %s is above topology %s, whose number of FFN workers stays" $v.autoscale.min $v.topology) -}}
{{- end -}}
{{- if and $apply (lt $minX $x) -}}
{{- fail (printf "autoscale.min %s is below topology %s, without whose attention workers the cluster does not form" $v.autoscale.min $v.topology) -}}
{{- end -}}
{{- end -}}
{{- $scalers := list -}}
{{- range $name, $on := dict "attention.hpa" $v.attention.hpa.enabled "attention.keda" $v.attention.keda.enabled "autoscale.mode apply" $apply -}}
{{- if $on -}}
{{- $scalers = append $scalers $name -}}
{{- end -}}
{{- end -}}
{{- if gt (len $scalers) 1 -}}
{{- fail (printf "%s would both set the number of attention workers: enable one" (join " and " $scalers)) -}}
{{- end -}}
{{- range $name := list "hpa" "keda" -}}
{{- $scaler := get $v.attention $name -}}
{{- if and $scaler.enabled (lt (int $scaler.maxReplicas) $x) -}}
{{- fail (printf "attention.%s.maxReplicas is below topology %s" $name $v.topology) -}}
{{- end -}}
{{- end -}}
{{- if and $v.attention.keda.enabled (not $v.attention.keda.serverAddress) -}}
{{- fail "attention.keda.enabled needs attention.keda.serverAddress: the Prometheus to ask" -}}
{{- end -}}
{{- if and $v.gateway.hpa.enabled (lt (int $v.gateway.hpa.maxReplicas) (int $v.gateway.replicas)) -}}
{{- fail "gateway.hpa.maxReplicas is below gateway.replicas" -}}
{{- end -}}
{{- end -}}

{{/* Workers of two configurations do not mix: each replaced one would be refused, and nobody served meanwhile. */}}
{{- define "afd.checkUpgrade" -}}
{{- $name := include "afd.fullname" . -}}
{{- $running := 0 -}}
{{- range $role := list "attention" "ffn" -}}
{{- $running = add $running (dig "spec" "replicas" 0 (lookup "apps/v1" "StatefulSet" $.Release.Namespace (printf "%s-%s" $name $role)) | int) -}}
{{- end -}}
{{- if .Capabilities.APIVersions.Has "disaggregatedset.x-k8s.io/v1" -}}
{{- $running = add $running (len (lookup "disaggregatedset.x-k8s.io/v1" "DisaggregatedSet" .Release.Namespace $name)) -}}
{{- end -}}
{{- $present := lookup "v1" "ConfigMap" .Release.Namespace (printf "%s-config-ffn" $name) -}}
{{- $agreed := dig "metadata" "annotations" "afd/agreed" "" $present -}}
{{- if and $running $agreed (ne $agreed (include "afd.agreed" .)) -}}
{{- fail (printf "the workers that run were started with another model, dtype, weights, wire, ffnParallel, maxStepTokens or number of FFN workers, and would refuse new ones: install a second release beside this one and move the traffic (docs/operations.md, \"Blue and green\"), or first stop them: kubectl -n %s scale statefulset/%s-attention statefulset/%s-ffn --replicas=0" .Release.Namespace $name $name) -}}
{{- end -}}
{{- end -}}
