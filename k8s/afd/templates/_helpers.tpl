{{/* Names, labels, the topology taken apart, ports, and the configuration file. */}}

{{/* Begins every name, which may have 63 characters: a long release name is cut, and stays unlike others. */}}
{{- define "afd.fullname" -}}
{{- $name := .Release.Name -}}
{{- if gt (len $name) 40 -}}
{{- $name = printf "%s-%s" (trunc 31 $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Selector labels of one role; call with (list $ "attention"). */}}
{{- define "afd.selector" -}}
app.kubernetes.io/name: afd
app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "afd.labels" -}}
{{ include "afd.selector" . }}
app.kubernetes.io/version: {{ (index . 0).Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service | quote }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version | quote }}
{{- end -}}

{{- define "afd.numAttention" -}}
{{- regexReplaceAll "A.*" .Values.topology "" -}}
{{- end -}}

{{- define "afd.numFfn" -}}
{{- regexReplaceAll ".*A([0-9]+)F" .Values.topology "${1}" -}}
{{- end -}}

{{/* Every port of the release. Metrics ports differ by role, so that roles share a node in the host's network. */}}
{{- define "afd.ports" -}}
gateway: 8000
coordinator: 7070
serving: 7071
mesh: 7072
metrics: {attention: 9101, ffn: 9102, coordinator: 9103, autoscale: 9104}
{{- end -}}

{{- define "afd.image" -}}
{{- $tag := .Values.image.tag | default (printf "%s%s" .Chart.AppVersion (eq .Values.device "cuda" | ternary "-cuda" "")) -}}
{{ .Values.image.repository }}:{{ $tag }}
{{- end -}}

{{- define "afd.secretName" -}}
{{- .Values.secret.existingSecret | default (printf "%s-secret" (include "afd.fullname" .)) -}}
{{- end -}}

{{- define "afd.coordinatorAddress" -}}
{{ include "afd.fullname" . }}-coordinator.{{ .Release.Namespace }}.svc:{{ (include "afd.ports" . | fromYaml).coordinator }}
{{- end -}}

{{/* The configuration file that every role reads: what the values say, and the rest of .Values.config. */}}
{{- define "afd.config" -}}
{{- $v := .Values -}}
{{- $ports := include "afd.ports" . | fromYaml -}}
{{- $coordinator := dict "address" (include "afd.coordinatorAddress" .) "metrics_port" $ports.metrics.coordinator -}}
{{- if $v.tls.enabled -}}
{{- range $key, $file := dict "tls_cert_file" "tls.crt" "tls_key_file" "tls.key" "tls_ca_file" "ca.crt" -}}
{{- $_ := set $coordinator $key (printf "/etc/afd/tls/%s" $file) -}}
{{- end -}}
{{- end -}}
{{- $gateway := dict "port" $ports.gateway "drain_s" $v.drainSeconds -}}
{{- if $v.apiKeys -}}
{{- $_ := set $gateway "api_keys_file" "/etc/afd/secret/api-keys" -}}
{{- end -}}
{{- $set := dict
  "model" (dict "name" $v.model.name "served_name" $v.model.servedName "dtype" $v.model.dtype "max_context" $v.model.maxContext)
  "cluster" (dict "topology" $v.topology "transport" $v.transport "ffn_parallel" $v.ffnParallel
      "dispatch" $v.dispatch "secret_file" "/etc/afd/secret/cluster-secret" "recovery_timeout_s" $v.recoveryTimeoutSeconds)
  "attention" (dict "streams" $v.streams "kv_cache_gib" $v.attention.kvCacheGiB "max_num_seqs" $v.attention.maxNumSeqs
      "max_step_tokens" $v.attention.maxStepTokens "device" $v.device "port" $ports.serving
      "metrics_port" $ports.metrics.attention)
  "ffn" (dict "device" $v.device "mesh_port" $ports.mesh "metrics_port" $ports.metrics.ffn)
  "coordinator" $coordinator
  "gateway" $gateway
  "sla" (dict "tpot_ms" $v.sla.tpotMs "ttft_ms" $v.sla.ttftMs "policy" $v.sla.policy)
  "log" (dict "level" $v.log.level "format" $v.log.format)
-}}
{{- range $section, $keys := $v.config -}}
{{- range $key, $_ := $keys -}}
{{- if hasKey (get $set $section | default dict) $key -}}
{{- fail (printf "config.%s.%s is already set from other values of this chart: change those" $section $key) -}}
{{- end -}}
{{- end -}}
{{- end -}}
{{- range $section, $keys := mustMerge $set (deepCopy $v.config) }}
[{{ $section }}]
{{- range $key, $value := $keys }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* What no schema can say. */}}
{{- define "afd.check" -}}
{{- $v := .Values -}}
{{- if not (regexMatch "^[a-z]([-a-z0-9]*[a-z0-9])?$" .Release.Name) -}}
{{- fail (printf "release name %q: Services are named after it, so it must begin with a lower-case letter and hold only lower-case letters, digits and -" .Release.Name) -}}
{{- end -}}
{{- if not (regexMatch "^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$" .Release.Namespace) -}}
{{- fail (printf "namespace %q: it may hold only lower-case letters, digits and -, at most 63, and neither begin nor end with -" .Release.Namespace) -}}
{{- end -}}
{{- if and $v.hostNetwork $v.networkPolicy.enabled -}}
{{- fail "hostNetwork pods are outside NetworkPolicies: set networkPolicy.enabled to false with hostNetwork" -}}
{{- end -}}
{{- if and (eq $v.dispatch "sparse") (eq $v.ffnParallel "tp") -}}
{{- fail "dispatch sparse leaves out no row with ffnParallel tp: every FFN worker has a slice of every expert" -}}
{{- end -}}
{{- if and $v.tls.enabled (not $v.tls.secretName) -}}
{{- fail "tls.enabled needs tls.secretName: a Secret with tls.crt, tls.key and ca.crt" -}}
{{- end -}}
{{- if and $v.apiKeys (not $v.secret.existingSecret) -}}
{{- fail "apiKeys needs secret.existingSecret: a Secret with the keys cluster-secret and api-keys" -}}
{{- end -}}
{{- if and (hasPrefix $v.model.mountPath $v.model.name) (not $v.model.volume) -}}
{{- fail (printf "model.name %s lies under model.mountPath: model.volume says where the files come from" $v.model.name) -}}
{{- end -}}
{{- if and $v.gateway.ingress.enabled (not $v.gateway.ingress.host) -}}
{{- fail "gateway.ingress.enabled needs gateway.ingress.host" -}}
{{- end -}}
{{- if and $v.gateway.httpRoute.enabled (not $v.gateway.httpRoute.parentRefs) -}}
{{- fail "gateway.httpRoute.enabled needs gateway.httpRoute.parentRefs" -}}
{{- end -}}
{{- $min := regexReplaceAll "A.*" $v.autoscale.min "" | int -}}
{{- $x := include "afd.numAttention" . | int -}}
{{- if and $v.autoscale.enabled (eq $v.autoscale.mode "apply") -}}
{{- if lt $min $x -}}
{{- fail (printf "autoscale.min %s is below topology %s, without whose attention workers the cluster does not form" $v.autoscale.min $v.topology) -}}
{{- end -}}
{{- if $v.attention.hpa.enabled -}}
{{- fail "attention.hpa and autoscale.mode apply would both set the number of attention workers: enable one" -}}
{{- end -}}
{{- end -}}
{{- if and $v.attention.hpa.enabled (lt (int $v.attention.hpa.maxReplicas) $x) -}}
{{- fail (printf "attention.hpa.maxReplicas is below topology %s" $v.topology) -}}
{{- end -}}
{{- end -}}
