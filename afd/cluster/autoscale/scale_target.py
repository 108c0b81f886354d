"""The Kubernetes object whose replicas are the number of attention workers: patched through its /scale subresource.

Speaks to the API server from inside a pod, with the pod's service account. The token file is read for each call
(Kubernetes rotates it).
"""

from __future__ import annotations

import json
import os
import ssl
from dataclasses import dataclass
from pathlib import Path

import httpx

from afd.errors import AfdError, ConfigError

ACCOUNT_DIR = Path("/var/run/secrets/kubernetes.io/serviceaccount")
TIMEOUT_S = 5.0
API_PATHS = {
    "statefulsets": "/apis/apps/v1",
    "disaggregatedsetrolescalers": "/apis/disaggregatedset.x-k8s.io/v1",
}


class ScaleError(AfdError):
    """The API server did not take the new size. Tried again with the next observation."""


@dataclass(frozen=True, slots=True)
class ScaleTarget:
    """One scalable object.

    url: of the API server.
    account_dir: token, namespace and ca.crt.
    """

    resource: str
    name: str
    url: str
    account_dir: Path = ACCOUNT_DIR

    @classmethod
    def parse(cls, text: str, *, account_dir: Path = ACCOUNT_DIR) -> ScaleTarget:
        """ "statefulsets/afd-attention" -> the object in this pod's namespace; ConfigError outside a pod."""
        resource, _, name = text.partition("/")
        if resource not in API_PATHS or not name:
            raise ConfigError(
                f"--apply {text!r} is not of the form RESOURCE/NAME, RESOURCE one of {', '.join(API_PATHS)}"
            )
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT", "443")
        if not host or not (account_dir / "token").is_file():
            raise ConfigError("--apply works inside a Kubernetes pod with a mounted service account only")
        return cls(resource, name, f"https://{f'[{host}]' if ':' in host else host}:{port}", account_dir)

    def replicas(self) -> int:
        """How many it is set to (not: how many there are). ScaleError as for `set_replicas`."""
        scale = self._call("GET", None)
        try:
            return int(scale.json()["spec"].get("replicas", 0))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ScaleError(f"{self.resource}/{self.name} answered with no Scale: {scale.text[:200]!r}") from error

    def set_replicas(self, replicas: int) -> None:
        """ScaleError with the server's reason when it refuses or cannot be reached."""
        self._call("PATCH", {"spec": {"replicas": replicas}})

    def _call(self, method: str, body: object) -> httpx.Response:
        namespace = self._read("namespace")
        path = f"{API_PATHS[self.resource]}/namespaces/{namespace}/{self.resource}/{self.name}/scale"
        headers = {
            "authorization": f"Bearer {self._read('token')}",
            "content-type": "application/merge-patch+json",
        }
        content = None if body is None else json.dumps(body)
        trust = _trust(self.account_dir / "ca.crt")
        try:
            with httpx.Client(verify=trust, timeout=TIMEOUT_S, trust_env=False) as client:
                response = client.request(method, self.url + path, content=content, headers=headers)
        except httpx.HTTPError as error:
            raise ScaleError(f"the Kubernetes API at {self.url} cannot be reached: {error}") from error
        if response.status_code != httpx.codes.OK:
            raise ScaleError(
                f"{method} of the scale of {self.resource}/{self.name} was refused: "
                f"{response.status_code} {' '.join(response.text.split())[:200]}"
            )
        return response

    def _read(self, name: str) -> str:
        try:
            return (self.account_dir / name).read_text(encoding="ascii").strip()
        except OSError as error:
            raise ScaleError(f"cannot read the service account's {name}: {error.strerror}") from error


def _trust(ca_file: Path) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=str(ca_file))
    except OSError as error:
        raise ScaleError(f"cannot read the API server's CA {ca_file}: {error.strerror}") from error
