{{/*
The pod template of an attention or FFN worker; call with (dict "root" $ "role" "ffn" "rank" true).
rank: the pod's ordinal is the rank it asks for (StatefulSet). Without, it takes any free one: names of a
DisaggregatedSet's pods change with each revision, and two revisions run beside each other during a roll-out.
*/}}
{{- define "afd.workerTemplate" -}}
{{- $root := .root -}}
{{- $v := $root.Values -}}
{{- $role := .role -}}
{{- $values := get $v $role -}}
{{- $ports := include "afd.ports" $root | fromYaml -}}
{{- $metricsPort := get $ports.metrics $role -}}
metadata:
  {{- include "afd.podMetadata" (list $root $role $values) | nindent 2 }}
spec:
  {{- include "afd.podSettings" (list $root $values (add $v.drainSeconds 15)) | nindent 2 }}
  {{- if $v.hostNetwork }}
  hostNetwork: true
  dnsPolicy: ClusterFirstWithHostNet
  {{- end }}
  {{- with include "afd.workerAffinity" (list $root $values) | fromYaml }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- $doctor := and $v.rdma.enabled $v.rdma.doctor }}
  {{- if or $doctor $values.initContainers }}
  initContainers:
    {{- if $doctor }}
    - name: doctor
      {{- include "afd.container" (list $root (list "IPC_LOCK") "python") | nindent 6 }}
      args: [-m, stepmesh, doctor]
      resources:
        {{- include "afd.workerResources" (list $root $values) | nindent 8 }}
    {{- end }}
    {{- with $values.initContainers }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  {{- end }}
  containers:
    - name: {{ $role }}
      {{- include "afd.container" (list $root (ternary (list "IPC_LOCK") list $v.rdma.enabled) "afd") | nindent 6 }}
      args:
        - {{ $role }}
        - --config=/etc/afd/config/afd.toml
        - --host=0.0.0.0
        - --advertise-host=$(POD_IP)
        {{- if .rank }}
        - --rank=$(AFD_RANK)
        {{- end }}
      env:
        {{- if .rank }}
        - name: AFD_RANK
          valueFrom: {fieldRef: {fieldPath: "metadata.labels['apps.kubernetes.io/pod-index']"}}
        {{- end }}
        {{- include "afd.env" (list $values.env (ternary $v.rdma.env list $v.rdma.enabled)) | nindent 8 }}
      ports:
        {{- if eq $role "attention" }}
        - {name: serving, containerPort: {{ $ports.serving }}}
        {{- else }}
        - {name: mesh, containerPort: {{ $ports.mesh }}}
        {{- end }}
        - {name: metrics, containerPort: {{ $metricsPort }}}
      {{- include "afd.probes" (list "metrics" $v.probes.startupSeconds) | nindent 6 }}
      resources:
        {{- include "afd.workerResources" (list $root $values) | nindent 8 }}
      volumeMounts:
        {{- include "afd.mounts" $root | nindent 8 }}
        - {name: shm, mountPath: /dev/shm}
        {{- include "afd.modelMount" $root | nindent 8 }}
  volumes:
    {{- include "afd.volumes" (list $root $role) | nindent 4 }}
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ toJson $v.shmSizeLimit }}}
    {{- include "afd.modelVolume" $root | nindent 4 }}
{{- end -}}

{{/* The role's resources, with GPUs and RDMA devices added to both requests and limits. */}}
{{- define "afd.workerResources" -}}
{{- $v := (index . 0).Values -}}
{{- $devices := dict -}}
{{- if eq $v.device "cuda" -}}
{{- $_ := set $devices $v.gpu.resource $v.gpu.count -}}
{{- end -}}
{{- if $v.rdma.enabled -}}
{{- $_ := set $devices $v.rdma.resource $v.rdma.count -}}
{{- end -}}
{{- $devices = dict "requests" $devices "limits" $devices -}}
{{ mustMergeOverwrite (deepCopy (index . 1).resources) (deepCopy $devices) | toYaml }}
{{- end -}}

{{/* The role's own affinity, and all workers of the release in one domain of placement.topologyKey. */}}
{{- define "afd.workerAffinity" -}}
{{- $root := index . 0 -}}
{{- $affinity := dict -}}
{{- if and $root.Values.placement.topologyKey (eq $root.Values.shape "statefulsets") -}}
{{- $workers := list (dict "key" "app.kubernetes.io/component" "operator" "In" "values" (list "attention" "ffn")) -}}
{{- $selector := dict "matchLabels" (dict "app.kubernetes.io/instance" $root.Release.Name) "matchExpressions" $workers -}}
{{- $term := dict "labelSelector" $selector "topologyKey" $root.Values.placement.topologyKey -}}
{{- $_ := set $affinity "podAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" (list $term)) -}}
{{- end -}}
{{ mustMergeOverwrite $affinity (deepCopy (index . 1).affinity) | toYaml }}
{{- end -}}
