{{/* Parts of a pod that several roles share. `own` is what "afd.role" gives. */}}

{{/* Labels and annotations of a role's pods; call with (list $ "attention" $own). */}}
{{- define "afd.podMetadata" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $own := index . 2 -}}
labels:
  {{- $labels := merge (include "afd.selector" (list $root $role) | fromYaml) $own.podLabels }}
  {{- if eq $role "gateway" }}
  {{- /* To an inference gateway the whole cluster behind it is one server for prefill and decode. */}}
  {{- $labels = merge $labels (dict "llm-d.ai/inferenceServing" "true" "llm-d.ai/role" "both") }}
  {{- end }}
  {{- toYaml $labels | nindent 2 }}
annotations:
  # What the role reads at its start; log.level is read again while it runs.
  {{- $annotations := dict "checksum/config" (include "afd.checksum" (list $root $role)) }}
  {{- toYaml (merge $annotations $own.podAnnotations) | nindent 2 }}
{{- end -}}

{{/*
Who the pod is and where it runs; call with (list $ $own graceSeconds). All that a PodSpec has beside containers and volumes,
but for the affinity.
*/}}
{{- define "afd.podSettings" -}}
{{- $root := index . 0 -}}
{{- $own := index . 1 -}}
serviceAccountName: {{ include "afd.serviceAccount" $root | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ $own.terminationGracePeriodSeconds | default (index . 2) | int }}
securityContext:
  runAsNonRoot: true
  {{- with $root.Values.securityContext }}
  {{- toYaml . | nindent 2 }}
  {{- end }}
  # A volume with a model is not walked through at each start.
  fsGroupChangePolicy: OnRootMismatch
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- range $key := list "priorityClassName" "runtimeClassName" "schedulerName" "nodeSelector" "topologySpreadConstraints" "resourceClaims" }}
{{- with get $own $key }}
{{ $key }}: {{ toJson . }}
{{- end }}
{{- end }}
{{- $tolerations := $own.tolerations }}
{{- if $own.deadNodeSeconds }}
{{- range $taint := list "node.kubernetes.io/not-ready" "node.kubernetes.io/unreachable" }}
{{- $tolerations = append $tolerations (dict "key" $taint "operator" "Exists" "effect" "NoExecute" "tolerationSeconds" $own.deadNodeSeconds) }}
{{- end }}
{{- end }}
{{- with $tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Image, rights and command of a container; call with (list $ "attention" "afd"). */}}
{{- define "afd.container" -}}
{{- $root := index . 0 -}}
image: {{ include "afd.image" (list $root (index . 1)) | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
command: [{{ index . 2 }}]
{{ include "afd.rights" . }}
{{- end -}}

{{- define "afd.rights" -}}
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
{{- end -}}

{{/*
Alive: the process answers. Ready: it may be given work. Neither counts before the start-up probe has passed. Call with
(list $ "http" $own).
*/}}
{{- define "afd.probes" -}}
{{- $probes := mustMerge (deepCopy (index . 2).probes) (deepCopy (index . 0).Values.probes) -}}
startupProbe:
  httpGet: {path: /livez, port: {{ index . 1 }}}
  periodSeconds: 5
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ div (int $probes.startupSeconds) 5 }}
readinessProbe:
  httpGet: {path: /readyz, port: {{ index . 1 }}}
  periodSeconds: {{ $probes.readinessPeriodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /livez, port: {{ index . 1 }}}
  periodSeconds: {{ $probes.livenessPeriodSeconds }}
  timeoutSeconds: {{ $probes.timeoutSeconds }}
  failureThreshold: {{ $probes.livenessFailures }}
{{- end -}}

{{/* Environment: only what the arguments quote, where scratch files go, and what the values add. */}}
{{- define "afd.env" -}}
- name: POD_IP
  valueFrom: {fieldRef: {fieldPath: status.podIP}}
- name: HOME
  value: /tmp
{{- range . }}
{{- with . }}
{{ toYaml . }}
{{- end }}
{{- end }}
{{- end -}}

{{/* The role's resources; a claim of the pod (DRA) is the container's too. */}}
{{- define "afd.resources" -}}
{{- $resources := deepCopy .resources -}}
{{- if .resourceClaims -}}
{{- $claims := list -}}
{{- range .resourceClaims -}}
{{- $claims = append $claims (dict "name" .name) -}}
{{- end -}}
{{- $_ := set $resources "claims" $claims -}}
{{- end -}}
{{- toYaml $resources -}}
{{- end -}}

{{/* Call with (list $ $own). */}}
{{- define "afd.mounts" -}}
- {name: config, mountPath: /etc/afd/config, readOnly: true}
- {name: secret, mountPath: /etc/afd/secret, readOnly: true}
- {name: scratch, mountPath: /tmp}
{{- if (index . 0).Values.tls.enabled }}
- {name: tls, mountPath: /etc/afd/tls, readOnly: true}
{{- end }}
{{- with (index . 1).extraVolumeMounts }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Volumes of one role; call with (list $ "attention" $own). Each sees the keys of the Secrets that it needs, no more. */}}
{{- define "afd.volumes" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
- name: config
  configMap:
    name: {{ include "afd.fullname" $root }}-config-{{ $role }}
- name: secret
  secret:
    secretName: {{ include "afd.secretName" $root | quote }}
    defaultMode: 0440
    items:
      - {key: cluster-secret, path: cluster-secret}
      {{- if and (eq $role "gateway") $root.Values.apiKeys }}
      - {key: api-keys, path: api-keys}
      {{- end }}
- name: scratch
  emptyDir: {sizeLimit: 1Gi}
{{- if $root.Values.tls.enabled }}
- name: tls
  secret:
    secretName: {{ $root.Values.tls.secretName | quote }}
    defaultMode: 0440
    items:
      - {key: ca.crt, path: ca.crt}
      {{- if eq $role "coordinator" }}
      - {key: tls.crt, path: tls.crt}
      - {key: tls.key, path: tls.key}
      {{- end }}
{{- end }}
{{- with (index . 2).extraVolumes }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* --- the model's files: in gateways and workers ------------------------------------------------------------------ */}}

{{- define "afd.modelMount" -}}
{{- if .Values.model.volume -}}
- {name: model, mountPath: {{ .Values.model.mountPath | quote }}, readOnly: true}
{{- end -}}
{{- end -}}

{{- define "afd.modelVolume" -}}
{{- $filled := not (not .Values.model.download.image) -}}
{{- with .Values.model.volume -}}
- name: model
  {{- if .pvc }}
  persistentVolumeClaim: {claimName: {{ .pvc.claimName | quote }}, readOnly: {{ not $filled }}}
  {{- else if .hostPath }}
  hostPath: {path: {{ .hostPath.path | quote }}, type: {{ $filled | ternary "DirectoryOrCreate" "Directory" }}}
  {{- else if hasKey . "emptyDir" }}
  emptyDir: {sizeLimit: {{ .emptyDir.sizeLimit | toJson }}}
  {{- else if .nfs }}
  {{- /* As Kubernetes has them; read-only unless something fills them. */}}
  nfs: {{ set (deepCopy .nfs) "readOnly" (not $filled) | toJson }}
  {{- else if .csi }}
  csi: {{ set (deepCopy .csi) "readOnly" (not $filled) | toJson }}
  {{- else }}
  image: {reference: {{ .image.reference | quote }}}
  {{- end }}
{{- end -}}
{{- end -}}

{{/*
Init containers of one role; call with (list $ "attention" $own): the model's download, what looks at the RDMA devices, and the
role's own. "" when there are none.
*/}}
{{- define "afd.initContainers" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
{{- $own := index . 2 -}}
{{- $v := $root.Values -}}
{{- if and $v.model.download.image (ne $role "coordinator") (ne $role "autoscale") }}
- name: download
  image: {{ $v.model.download.image | quote }}
  imagePullPolicy: {{ $v.image.pullPolicy }}
  {{- with $v.model.download.command }}
  command: {{ toJson . }}
  {{- end }}
  {{- with $v.model.download.args }}
  args: {{ toJson . }}
  {{- end }}
  {{- include "afd.rights" . | nindent 2 }}
  env:
    - {name: AFD_ROLE, value: {{ $role }}}
    - {name: HOME, value: /tmp}
    {{- with $v.model.download.env }}
    {{- toYaml . | nindent 4 }}
    {{- end }}
  resources:
    {{- toYaml $v.model.download.resources | nindent 4 }}
  volumeMounts:
    - {name: scratch, mountPath: /tmp}
    - {name: model, mountPath: {{ $v.model.mountPath | quote }}}
{{- end }}
{{- if and $v.rdma.enabled $v.rdma.doctor (include "afd.isWorker" $role) }}
- name: doctor
  {{- include "afd.container" (list $root $role "python") | nindent 2 }}
  args: [-m, stepmesh, doctor]
  resources:
    {{- include "afd.workerResources" (list $root $role $own) | nindent 4 }}
{{- end }}
{{- with $own.initContainers }}
{{ toYaml . }}
{{- end }}
{{- end -}}
