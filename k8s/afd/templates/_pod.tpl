{{/* Parts of a pod that several roles share. */}}

{{/* Labels and annotations of a role's pods; call with (list $ "attention" .Values.attention). */}}
{{- define "afd.podMetadata" -}}
{{- $root := index . 0 -}}
labels:
  {{- include "afd.labels" (list $root (index . 1)) | nindent 2 }}
annotations:
  # A changed configuration is a new pod: nothing is read twice.
  {{- $annotations := dict "checksum/config" (include "afd.config" $root | sha256sum) }}
  {{- toYaml (merge $annotations (deepCopy (index . 2).podAnnotations)) | nindent 2 }}
{{- end -}}

{{/* Who the pod is and where it runs; call with (list $ .Values.attention graceSeconds). */}}
{{- define "afd.podSettings" -}}
{{- $root := index . 0 -}}
serviceAccountName: {{ include "afd.fullname" $root | quote }}
automountServiceAccountToken: false
enableServiceLinks: false
terminationGracePeriodSeconds: {{ index . 2 }}
securityContext:
  runAsNonRoot: true
  runAsUser: 10001
  runAsGroup: 10001
  fsGroup: 10001
  seccompProfile: {type: RuntimeDefault}
{{- with $root.Values.imagePullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with (index . 1).nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with (index . 1).tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Image, rights and command of a container; call with (list $ extraCapabilities "afd"). */}}
{{- define "afd.container" -}}
{{- $root := index . 0 -}}
image: {{ include "afd.image" $root | quote }}
imagePullPolicy: {{ $root.Values.image.pullPolicy }}
command: [{{ index . 2 }}]
securityContext:
  allowPrivilegeEscalation: false
  readOnlyRootFilesystem: true
  capabilities:
    drop: [ALL]
    {{- with index . 1 }}
    add: {{ toJson . }}
    {{- end }}
{{- end -}}

{{/* Alive: the process answers. Ready: it may be given work. Neither counts before the start-up probe has passed. */}}
{{- define "afd.probes" -}}
startupProbe:
  httpGet: {path: /livez, port: {{ index . 0 }}}
  periodSeconds: 5
  failureThreshold: {{ div (int (index . 1)) 5 }}
readinessProbe:
  httpGet: {path: /readyz, port: {{ index . 0 }}}
  periodSeconds: 2
  timeoutSeconds: 2
  failureThreshold: 2
livenessProbe:
  httpGet: {path: /livez, port: {{ index . 0 }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
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

{{- define "afd.mounts" -}}
- {name: config, mountPath: /etc/afd/config, readOnly: true}
- {name: secret, mountPath: /etc/afd/secret, readOnly: true}
- {name: scratch, mountPath: /tmp}
{{- if .Values.tls.enabled }}
- {name: tls, mountPath: /etc/afd/tls, readOnly: true}
{{- end }}
{{- end -}}

{{/* Volumes of one role; call with (list $ "attention"). Each sees the keys of the Secrets that it needs, no more. */}}
{{- define "afd.volumes" -}}
{{- $root := index . 0 -}}
{{- $role := index . 1 -}}
- name: config
  configMap:
    name: {{ include "afd.fullname" $root }}-config
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
{{- end -}}

{{- define "afd.modelMount" -}}
{{- if .Values.model.volume -}}
- {name: model, mountPath: {{ .Values.model.mountPath | quote }}, readOnly: true}
{{- end -}}
{{- end -}}

{{- define "afd.modelVolume" -}}
{{- with .Values.model.volume -}}
- name: model
  {{- if .pvc }}
  persistentVolumeClaim: {claimName: {{ .pvc.claimName | quote }}, readOnly: true}
  {{- else if .hostPath }}
  hostPath: {path: {{ .hostPath.path | quote }}, type: Directory}
  {{- else }}
  image: {reference: {{ .image.reference | quote }}}
  {{- end }}
{{- end -}}
{{- end -}}
