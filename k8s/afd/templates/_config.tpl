{{/* The configuration file of each role: what the values say, and the rest of .Values.config. */}}

{{/* Every key that is set, as JSON; call with (list $ "ffn"). What differs by role is as that role has it. */}}
{{- define "afd.settings" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $v := $root.Values -}}
{{- $ports := include "afd.ports" $root | fromYaml -}}
{{- $coordinator := dict "address" (include "afd.coordinatorAddress" $root) "metrics_port" $ports.metrics.coordinator -}}
{{- if $v.tls.enabled -}}
{{- range $key, $file := dict "tls_cert_file" "tls.crt" "tls_key_file" "tls.key" "tls_ca_file" "ca.crt" -}}
{{- $_ := set $coordinator $key (printf "/etc/afd/tls/%s" $file) -}}
{{- end -}}
{{- end -}}
{{- $drain := eq $role "gateway" | ternary $v.gateway.drainSeconds $v.drainSeconds -}}
{{- $gateway := dict "port" $ports.gateway "drain_s" $drain -}}
{{- if $v.apiKeys -}}
{{- $_ := set $gateway "api_keys_file" "/etc/afd/secret/api-keys" -}}
{{- end -}}
{{- $topology := $v.topology -}}
{{- if include "afd.isWorker" $role -}}
{{- /* How many attention workers there are is no worker's business: it may change while they run. */ -}}
{{- $topology = printf "1A%sF" (include "afd.numFfn" $root) -}}
{{- end -}}
{{- $set := dict
  "model" (dict "name" $v.model.name "served_name" $v.model.servedName "dtype" $v.model.dtype "max_context" $v.model.maxContext)
  "cluster" (dict "topology" $topology "standby_ffn" $v.ffn.standby "transport" $v.transport "ffn_parallel" $v.ffnParallel
      "dispatch" $v.dispatch "secret_file" "/etc/afd/secret/cluster-secret" "recovery_timeout_s" $v.recoveryTimeoutSeconds)
  "attention" (dict "streams" $v.streams "kv_cache_gib" $v.attention.kvCacheGiB "max_num_seqs" $v.attention.maxNumSeqs
      "max_step_tokens" $v.attention.maxStepTokens "port" $ports.serving "metrics_port" $ports.metrics.attention
      "device" (include "afd.workerValue" (list $root "attention" "device") | fromJson).value)
  "ffn" (dict "mesh_port" $ports.mesh "metrics_port" $ports.metrics.ffn
      "device" (include "afd.workerValue" (list $root "ffn" "device") | fromJson).value)
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
{{- mustMerge $set (deepCopy $v.config) | toJson -}}
{{- end -}}

{{/* The configuration file of one role: the keys that it reads; call with (list $ "ffn"). */}}
{{- define "afd.config" -}}
{{- $settings := include "afd.settings" . | fromJson -}}
{{- range $section, $wanted := get ((index . 0).Files.Get "files/config-keys.yaml" | fromYaml) (index . 1) -}}
{{- $keys := dict -}}
{{- range $key, $value := get $settings $section | default dict -}}
{{- if or (has "*" $wanted) (has $key $wanted) -}}
{{- $_ := set $keys $key $value -}}
{{- end -}}
{{- end -}}
{{- if $keys }}
[{{ $section }}]
{{- range $key, $value := $keys }}
{{ $key }} = {{ toJson $value }}
{{- end }}
{{- if and (eq (index $ 1) "ffn") (eq $section "attention") }}
min_chunk_tokens = 1  # may not exceed max_step_tokens; attention workers have their own
{{- end }}
{{- end }}
{{- end -}}
{{- end -}}

{{/* Over what a role's pods read at their start only: log.level is read again while they run. */}}
{{- define "afd.checksum" -}}
{{- regexReplaceAllLiteral "(?m)^level = .*$" (include "afd.config" .) "" | sha256sum -}}
{{- end -}}

{{/* Over what all workers must agree on: a worker that differs is refused by the coordinator. */}}
{{- define "afd.agreed" -}}
{{- $settings := include "afd.settings" (list . "ffn") | fromJson -}}
{{- dict "model" (pick $settings.model "name" "dtype" "weights") "cluster" (pick $settings.cluster "topology" "wire" "ffn_parallel")
    "max_step_tokens" $settings.attention.max_step_tokens | toJson | sha256sum | trunc 32 -}}
{{- end -}}
