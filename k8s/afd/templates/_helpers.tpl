{{/* Names, labels, the topology taken apart, ports, and what a role's values are. */}}

{{/* Begins every name, which may have 63 characters: a long release name is cut, and stays unlike others. */}}
{{- define "afd.fullname" -}}
{{- $name := .Release.Name -}}
{{- if gt (len $name) 40 -}}
{{- $name = printf "%s-%s" (trunc 31 $name | trimSuffix "-") (sha256sum $name | trunc 8) -}}
{{- end -}}
{{- $name -}}
{{- end -}}

{{/* Name, namespace and labels of an object; call with (list $ "-attention" "attention"): suffix of the name, role. */}}
{{- define "afd.metadata" -}}
{{- $root := index . 0 -}}
name: {{ printf "%s%s" (include "afd.fullname" $root) (index . 1) | quote }}
namespace: {{ $root.Release.Namespace | quote }}
labels:
  {{- include "afd.labels" (list $root (index . 2)) | nindent 2 }}
{{- end -}}

{{/* Selector labels of one role; call with (list $ "attention"). */}}
{{- define "afd.selector" -}}
app.kubernetes.io/name: afd
app.kubernetes.io/instance: {{ (index . 0).Release.Name | quote }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Of objects, never of pods: a pod with the chart's version in its labels is replaced with each new one. */}}
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

{{/* FFN workers with those on standby. */}}
{{- define "afd.numFfnPods" -}}
{{- add (include "afd.numFfn" . | int) .Values.ffn.standby -}}
{{- end -}}

{{/* Every address of the pod, of its family: that of $(POD_IP). */}}
{{- define "afd.anyHost" -}}
{{- eq .Values.ipFamily "IPv6" | ternary "::" "0.0.0.0" -}}
{{- end -}}

{{/* Every port of the release. Metrics ports differ by role, so that roles share a node in the host's network. */}}
{{- define "afd.ports" -}}
gateway: 8000
coordinator: 7070
serving: 7071
mesh: 7072
metrics: {attention: 9101, ffn: 9102, coordinator: 9103, autoscale: 9104}
{{- end -}}

{{/*
The values of one role as JSON; call with (list $ "attention"). What .Values.pods says of every pod comes first: lists are
joined, maps merged, anything else is the role's own where it has one, as are items of the same name.
*/}}
{{- define "afd.role" -}}
{{- $own := deepCopy (get (index . 0).Values (index . 1)) -}}
{{- range $key, $common := deepCopy (index . 0).Values.pods -}}
{{- $mine := get $own $key -}}
{{- if kindIs "slice" $common -}}
{{- $names := list -}}
{{- range $mine | default list -}}
{{- $names = append $names (include "afd.itemName" .) -}}
{{- end -}}
{{- $joined := list -}}
{{- range $common -}}
{{- if not (has (include "afd.itemName" . | default "\n") $names) -}}
{{- $joined = append $joined . -}}
{{- end -}}
{{- end -}}
{{- $_ := set $own $key (concat $joined ($mine | default list) | default list) -}}
{{- else if kindIs "map" $common -}}
{{- $_ := set $own $key (mustMerge ($mine | default dict) $common) -}}
{{- else -}}
{{- $_ := set $own $key ($mine | default $common) -}}
{{- end -}}
{{- end -}}
{{- toJson $own -}}
{{- end -}}

{{/* By what Kubernetes tells the items of a list apart (mounts, spread constraints, all that has a name); "" = not at all. */}}
{{- define "afd.itemName" -}}
{{- if .topologyKey -}}
{{ .topologyKey }} {{ .whenUnsatisfiable }}
{{- else -}}
{{ .mountPath | default .name | default "" }}
{{- end -}}
{{- end -}}

{{/* {"value": what a worker's own values or, where they leave it open, the release's say}; (list $ "ffn" "device"). */}}
{{- define "afd.workerValue" -}}
{{- $own := get (index . 0).Values (index . 1) -}}
{{- $value := get (index . 0).Values (index . 2) -}}
{{- if hasKey $own (index . 2) -}}
{{- if kindIs "map" $value -}}
{{- $value = deepCopy $value -}}
{{- /* Key by key: a merge takes 0 for nothing said. */ -}}
{{- range $key, $mine := get $own (index . 2) -}}
{{- $_ := set $value $key $mine -}}
{{- end -}}
{{- else -}}
{{- $value = get $own (index . 2) -}}
{{- end -}}
{{- end -}}
{{- toJson (dict "value" $value) -}}
{{- end -}}

{{/* Whether a role is a worker of the data plane. */}}
{{- define "afd.isWorker" -}}
{{- if has . (list "attention" "ffn") -}}yes{{- end -}}
{{- end -}}

{{/* Image of a role. The tag is the chart's; workers that need CUDA's or RDMA's libraries have the image with them. */}}
{{- define "afd.image" -}}
{{- $root := index . 0 -}}
{{- $image := mustMerge (deepCopy (get (get $root.Values (index . 1)) "image" | default dict)) (deepCopy $root.Values.image) -}}
{{- $suffix := "" -}}
{{- if include "afd.isWorker" (index . 1) -}}
{{- if or $root.Values.rdma.enabled (eq (include "afd.workerValue" (list $root (index . 1) "device") | fromJson).value "cuda") -}}
{{- $suffix = "-cuda" -}}
{{- end -}}
{{- end -}}
{{ $image.repository }}:{{ $image.tag | default (printf "%s%s" $root.Chart.AppVersion $suffix) }}
{{- end -}}

{{- define "afd.secretName" -}}
{{- .Values.secret.existingSecret | default (printf "%s-secret" (include "afd.fullname" .)) -}}
{{- end -}}

{{- define "afd.serviceAccount" -}}
{{- .Values.serviceAccount.name | default (include "afd.fullname" .) -}}
{{- end -}}

{{- define "afd.coordinatorAddress" -}}
{{ include "afd.fullname" . }}-coordinator.{{ .Release.Namespace }}.svc:{{ (include "afd.ports" . | fromYaml).coordinator }}
{{- end -}}

{{/* A Kubernetes quantity such as 8Gi or 500m as a number. */}}
{{- define "afd.quantity" -}}
{{- $text := toString . -}}
{{- $unit := regexFind "[a-zA-Z]+$" $text -}}
{{- $scale := get (dict "" 1 "m" 0.001 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "P" 1e15 "E" 1e18 "Ki" 1024 "Mi" 1048576
    "Gi" 1073741824 "Ti" 1099511627776 "Pi" 1125899906842624 "Ei" 1152921504606846976) $unit -}}
{{- mulf (float64 (trimSuffix $unit $text)) (float64 $scale) -}}
{{- end -}}
