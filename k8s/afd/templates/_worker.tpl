{{/*
The pod template of an attention or FFN worker; call with (dict "root" $ "role" "ffn" "rank" true).
rank: the pod's ordinal is the rank it asks for (StatefulSet). Without, it takes any free one: names of a
DisaggregatedSet's pods change with each revision, and two revisions run beside each other during a roll-out.
*/}}
{{- define "afd.workerTemplate" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
{{- $role := .role -}}
{{- $own := include "afd.role" (list $root $role) | fromJson -}}
{{- $ports := include "afd.ports" $root | fromYaml -}}
{{- /* An FFN worker has nothing to finish. */ -}}
{{- $grace := eq $role "attention" | ternary (add $v.drainSeconds 15) 30 -}}
metadata:
  {{- include "afd.podMetadata" (list $root $role $own) | nindent 2 }}
spec:
  {{- include "afd.podSettings" (list $root $own $grace) | nindent 2 }}
  {{- if (include "afd.workerValue" (list $root $role "hostNetwork") | fromJson).value }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- with include "afd.workerAffinity" (list $root $own) | fromYaml }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with include "afd.initContainers" (list $root $role $own) | trim }}
  initContainers:
    {{- . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ $role }}
      {{- include "afd.container" (list $root $role "afd") | nindent 6 }}
      args:
        - {{ $role }}
        - --config=/etc/afd/config/afd.toml
        - "--host={{ include "afd.anyHost" $root }}"
        - --advertise-host=$(POD_IP)
        {{- if .rank }}
        - --rank=$(AFD_RANK)
        {{- end }}
      env:
        {{- if .rank }}
        - name: AFD_RANK
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']"}}
        {{- end }}
        {{- include "afd.env" (list $own.env (ternary $v.rdma.env list $v.rdma.enabled)) | nindent 8 }}
      ports:
        {{- if eq $role "attention" }}
        - {name: serving, containerPort: {{ $ports.serving }}}
        {{- else }}
        - {name: mesh, containerPort: {{ $ports.mesh }}}
        {{- end }}
        - {name: metrics, containerPort: {{ get $ports.metrics $role }}}
      {{- include "afd.probes" (list $root "metrics" $own) | nindent 6 }}
      {{- with $own.lifecycle }}
      lifecycle: {{ toJson . }}
      {{- end }}
      resources:
        {{- include "afd.workerResources" (list $root $role $own) | nindent 8 }}
      volumeMounts:
        {{- include "afd.mounts" (list $root $own) | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        {{- include "afd.modelMount" $root | nindent 8 }}
    {{- with $own.extraContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  volumes:
    {{- include "afd.volumes" (list $root $role $own) | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ (include "afd.workerValue" (list $root $role "shmSizeLimit") | fromJson).value | toJson }}}
    {{- include "afd.modelVolume" $root | nindent 4 }}
{{- end -}}

{{/* The role's resources, with GPU and RDMA devices added to both requests and limits; call with (list $ "ffn" $own). */}}
{{- define "afd.workerResources" -}}
{{- $v := (index . 0).Values -}}
{{- $role := index . 1 -}}
{{- $devices := dict -}}
{{- $gpu := (include "afd.workerValue" (list (index . 0) $role "gpu") | fromJson).value -}}
{{- if and $gpu.count (eq (include "afd.workerValue" (list (index . 0) $role "device") | fromJson).value "cuda") -}}
{{- $_ := set $devices $gpu.resource $gpu.count -}}
{{- end -}}
{{- if $v.rdma.enabled -}}
{{- $_ := set $devices $v.rdma.resource $v.rdma.count -}}
{{- end -}}
{{- $devices = dict "requests" $devices "limits" $devices -}}
{{ mustMergeOverwrite (include "afd.resources" (index . 2) | fromYaml) (deepCopy $devices) | toYaml }}
{{- end -}}

{{/* The role's own affinity, and all workers of the release in one domain of placement.topologyKey. */}}
{{- define "afd.workerAffinity" -}}
{{- $root := index . 0 -}}
{{- $affinity := deepCopy (index . 1).affinity -}}
{{- if and $root.Values.placement.topologyKey (eq $root.Values.shape "statefulsets") -}}
{{- $workers := list (dict "key" "app.kubernetes.io/component" "operator" "In" "values" (list "attention" "ffn")) -}}
{{- $selector := dict "matchLabels" (dict "app.kubernetes.io/instance" $root.Release.Name) "matchExpressions" $workers -}}
{{- $term := dict "labelSelector" $selector "topologyKey" $root.Values.placement.topologyKey -}}
{{- $key := "requiredDuringSchedulingIgnoredDuringExecution" -}}
{{- $pods := $affinity.podAffinity | default dict -}}
{{- $_ := set $pods $key (prepend (get $pods $key | default list) $term) -}}
{{- $_ = set $affinity "podAffinity" $pods -}}
{{- end -}}
{{ toYaml $affinity }}
{{- end -}}

{{/*
Replicas of attention workers that something else scales: what runs now, where that can be looked up; never fewer than the
cluster needs to form. Without a number a StatefulSet would go back to one pod.
*/}}
{{- define "afd.scaledReplicas" -}}
{{- $wanted := include "afd.numAttention" . | int -}}
{{- $present := lookup "apps/v1" "StatefulSet" .Release.Namespace (printf "%s-attention" (include "afd.fullname" .)) -}}
{{- max $wanted (dig "spec" "replicas" 0 $present | int) -}}
{{- end -}}
