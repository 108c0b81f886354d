"""What the Pod Security Standards forbid, read off a pod: https://kubernetes.io/docs/concepts/security/pod-security-standards/."""

from __future__ import annotations

from collections.abc import Iterator

from tests.k8s.chart import Object

BASELINE_CAPABILITIES = {
    *("AUDIT_WRITE", "CHOWN", "DAC_OVERRIDE", "FOWNER", "FSETID", "KILL", "MKNOD", "NET_BIND_SERVICE"),
    *("SETFCAP", "SETGID", "SETPCAP", "SETUID", "SYS_CHROOT"),
}
RESTRICTED_VOLUMES = {
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected"),
    "secret",
}


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


def against_baseline(spec: Object) -> Iterator[str]:
    """What keeps the pod out of a namespace of level baseline."""
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield key
    for volume in spec.get("volumes", []):
        if "hostPath" in volume:
            yield f"hostPath volume {volume['name']}"
    for key in ("seLinuxOptions", "windowsOptions", "sysctls", "appArmorProfile"):
        if key in spec.get("securityContext", {}):
            yield f"securityContext.{key}"
    if spec.get("securityContext", {}).get("seccompProfile", {}).get("type") == "Unconfined":
        yield "seccomp Unconfined"
    for one in containers(spec):
        rights = one.get("securityContext", {})
        if rights.get("privileged"):
            yield f"{one['name']} is privileged"
        added = set(rights.get("capabilities", {}).get("add", []))
        if added - BASELINE_CAPABILITIES:
            yield f"{one['name']} adds {sorted(added)}"
        if rights.get("procMount", "Default") != "Default":
            yield f"{one['name']} procMount"
        if any("hostPort" in port for port in one.get("ports", [])):
            yield f"{one['name']} hostPort"
        if any("host" in one.get(probe, {}).get("httpGet", {}) for probe in ("livenessProbe", "readinessProbe")):
            yield f"{one['name']} probes another host"


def against_restricted(spec: Object) -> Iterator[str]:
    """What keeps it out of one of level restricted."""
    yield from against_baseline(spec)
    for volume in spec.get("volumes", []):
        if not (set(volume) - {"name"}) <= RESTRICTED_VOLUMES:
            yield f"volume {volume['name']}"
    pod = spec.get("securityContext", {})
    for one in containers(spec):
        rights = one.get("securityContext", {})
        if rights.get("allowPrivilegeEscalation") is not False:
            yield f"{one['name']} may escalate"
        if not rights.get("runAsNonRoot", pod.get("runAsNonRoot")):
            yield f"{one['name']} may be root"
        if rights.get("runAsUser", pod.get("runAsUser")) == 0:
            yield f"{one['name']} is root"
        if rights.get("seccompProfile", pod.get("seccompProfile", {})).get("type") not in (
            "RuntimeDefault",
            "Localhost",
        ):
            yield f"{one['name']} has no seccomp profile"
        capabilities = rights.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []) or set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
            yield f"{one['name']} keeps capabilities"
