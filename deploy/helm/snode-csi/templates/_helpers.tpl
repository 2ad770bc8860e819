{{- define "snode.labels" -}}
app.kubernetes.io/name: snode-csi
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end }}

{{- define "snode.image" -}}
{{ .Values.image.repository }}:{{ .Values.image.tag | default .Chart.AppVersion }}
{{- end }}

{{- /* "-NAME", or nothing for the SNODE without a name. */ -}}
{{- define "snode.suffix" -}}
{{- with .name }}-{{ . }}{{ end }}
{{- end }}

{{- /* The name of a SNODE's driver. */ -}}
{{- define "snode.driver" -}}
{{- if .driverName }}{{ .driverName }}{{ else if .name }}{{ .name }}.csi.snode.io{{ else }}csi.snode.io{{ end }}
{{- end }}

{{- /* The ConfigMap that a SNODE reads. */ -}}
{{- define "snode.configMap" -}}
snode-csi{{ if .config }}{{ include "snode.suffix" . }}{{ end }}
{{- end }}

{{- /* The driver of the SNODE that a StorageClass names: (dict "root" $ "class" CLASS). */ -}}
{{- define "snode.driverOf" -}}
{{- $class := .class }}
{{- $driver := "" }}
{{- range .root.Values.snodes }}
{{- if eq (.name | default "") ($class.snode | default "") }}{{ $driver = include "snode.driver" . }}{{ end }}
{{- end }}
{{- if not $driver }}
{{- fail (printf "storageClasses: %s is of SNODE %q, which snodes does not have; set its `snode` to the name of one" $class.name ($class.snode | default "")) }}
{{- end }}
{{- $driver }}
{{- end }}

{{- /* Folders of files pools: their mounts and volumes. */ -}}
{{- define "snode.hostPathMounts" -}}
{{- range $at, $path := .Values.hostPaths }}
- name: host-path-{{ $at }}
  mountPath: {{ $path | quote }}
  mountPropagation: HostToContainer
{{- end }}
{{- end }}
{{- define "snode.hostPathVolumes" -}}
{{- range $at, $path := .Values.hostPaths }}
- name: host-path-{{ $at }}
  hostPath:
    path: {{ $path | quote }}
    type: DirectoryOrCreate
{{- end }}
{{- end }}

{{- /* Root without what root may do. */ -}}
{{- define "snode.unprivileged" -}}
runAsUser: 0
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{- /* What all sidecars have. */ -}}
{{- define "snode.sidecar" -}}
# Root, since the driver's socket is for root alone, and nothing else that root may do.
securityContext:
  {{- include "snode.unprivileged" . | nindent 2 }}
resources:
  {{- toYaml .Values.sidecars.resources | nindent 2 }}
volumeMounts:
  - name: csi
    mountPath: /csi
{{- end }}
