"""As much of a Kubernetes API as helm and kubectl need: objects are kept, and every workload is at once as asked.

Not a Kubernetes: nothing is checked, defaulted, scheduled or run.
"""

from __future__ import annotations

import copy
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.k8s.chart import Object
from tests.k8s.kubernetes_protobuf import decoded

KINDS = {
    "v1": ("ConfigMap", "Namespace", "Node", "Pod", "Secret", "Service", "ServiceAccount"),
    "apps/v1": ("StatefulSet", "Deployment"),
    "policy/v1": ("PodDisruptionBudget",),
    "networking.k8s.io/v1": ("NetworkPolicy",),
    "autoscaling/v2": ("HorizontalPodAutoscaler",),
}
OF_THE_CLUSTER = {"Namespace", "Node"}
SCALED = {"StatefulSet", "Deployment"}
VERBS = ["create", "delete", "get", "list", "patch", "update"]


def plural(kind: str) -> str:
    return f"{kind.lower()[:-1]}ies" if kind.endswith("y") else f"{kind.lower()}s"


def path_of(one: Object, namespace: str) -> str:
    """Where an object is in the API."""
    version = one["apiVersion"]
    place = "" if one["kind"] in OF_THE_CLUSTER else f"/namespaces/{namespace}"
    return f"/{_root(version)}{place}/{plural(one['kind'])}/{one['metadata']['name']}"


def discovery() -> dict[str, Object]:
    """What the API says of itself, by path."""
    groups = [name for name in KINDS if "/" in name]
    return {
        "/version": {"major": "1", "minor": "36", "gitVersion": "v1.36.0"},
        "/api": {"kind": "APIVersions", "versions": ["v1"]},
        "/apis": {"kind": "APIGroupList", "apiVersion": "v1", "groups": [_group(name) for name in groups]},
        "/api/v1": _resources("v1"),
        **{f"/apis/{name}": _resources(name) for name in groups},
        "/openapi/v3": {"paths": {_root(name): {"serverRelativeURL": f"/openapi/v3/{_root(name)}"} for name in KINDS}},
        **{f"/openapi/v3/{_root(name)}": _openapi(name) for name in KINDS},
    }


def _root(group: str) -> str:
    return "api/v1" if group == "v1" else f"apis/{group}"


def _openapi(group: str) -> Object:
    """Says no more than that the server looks at fields itself, so that clients need not."""
    checked = [{"name": "fieldValidation", "in": "query", "schema": {"type": "string"}}]
    paths = {}
    for kind in KINDS[group]:
        name, _, version = group.rpartition("/")
        own = {"x-kubernetes-group-version-kind": {"group": name, "version": version, "kind": kind}}
        paths[f"/{_root(group)}/{plural(kind)}/{{name}}"] = {"patch": {"parameters": checked, **own}}
    return {"openapi": "3.0.0", "info": {"title": group, "version": "1"}, "paths": paths}


def _group(name: str) -> Object:
    version = {"groupVersion": name, "version": name.partition("/")[2]}
    return {"name": name.partition("/")[0], "versions": [version], "preferredVersion": version}


def _resources(group: str) -> Object:
    found = []
    for kind in KINDS[group]:
        common = {"singularName": kind.lower(), "namespaced": kind not in OF_THE_CLUSTER, "verbs": VERBS}
        found.append({"name": plural(kind), "kind": kind, **common})
        if kind in SCALED:
            scale = {"group": "autoscaling", "version": "v1", "kind": "Scale"}
            found.append({"name": f"{plural(kind)}/scale", **common, **scale})
    return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": found}


def merged(before: Any, change: Any) -> Any:
    """JSON merge patch: null removes, maps are merged, the rest is replaced."""
    if not isinstance(change, dict):
        return change
    found = dict(before) if isinstance(before, dict) else {}
    for key, value in change.items():
        if value is None:
            found.pop(key, None)
        elif not key.startswith("$"):  # a directive of a strategic merge
            found[key] = merged(found.get(key), value)
    return found


class Cluster:
    """The objects, by API path. One lock: requests of several connections come one after the other."""

    def __init__(self, objects: dict[str, Object] | None = None):
        self.objects = dict(objects or {})
        self._discovery = discovery()
        self._lock = threading.Lock()
        self._revision = 0

    def get(self, kind: str, name: str, namespace: str = "") -> Object:
        """One object; KeyError when there is none."""
        (group,) = [group for group, kinds in KINDS.items() if kind in kinds]
        return self.objects[path_of({"apiVersion": group, "kind": kind, "metadata": {"name": name}}, namespace)]

    def answer(self, method: str, url: str, kind_of_patch: str, body: Any) -> tuple[int, Object]:
        """(HTTP status, object) of a request."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        with self._lock:
            if method == "GET" and path in self._discovery:
                return 200, self._discovery[path]
            if path.endswith("/scale"):
                return self._scale(method, path.removesuffix("/scale"), body)
            if method == "POST":
                path = f"{path}/{body['metadata']['name']}"
                if path in self.objects:
                    return _failure(409, "AlreadyExists", path)
                return 201, self._keep(path, body, query)
            if "watch" in query:
                return 200, {}  # nothing changes by itself
            if method == "GET" and self._is_collection(path):
                return 200, self._listed(path, query)
            if method == "PATCH" and kind_of_patch == "application/apply-patch+yaml":
                status = 200 if path in self.objects else 201
                return status, self._keep(path, body, query)
            if path not in self.objects:
                return _failure(404, "NotFound", path)
            if method == "PATCH":
                return 200, self._keep(path, merged(self.objects[path], body), query)
            if method == "PUT":
                return 200, self._keep(path, body, query)
            if method == "DELETE":
                return 200, self._delete(path)
            return 200, self.objects[path]

    def _keep(self, path: str, one: Object, query: dict[str, list[str]]) -> Object:
        one = copy.deepcopy(one)
        self._revision += 1
        metadata = one["metadata"]
        metadata["resourceVersion"] = str(self._revision)
        metadata["uid"] = metadata.get("uid") or f"uid-{self._revision}"
        if "/namespaces/" in path:
            metadata["namespace"] = path.split("/namespaces/")[1].split("/")[0]
        if one["kind"] in SCALED:
            strategy = "updateStrategy" if one["kind"] == "StatefulSet" else "strategy"
            one["spec"].setdefault(strategy, {}).setdefault("type", "RollingUpdate")
            metadata["generation"] = metadata.get("generation", 0) + 1
            count = one["spec"].setdefault("replicas", 1)
            counts = dict.fromkeys(("replicas", "readyReplicas", "availableReplicas", "updatedReplicas"), count)
            same = {"currentRevision": "one", "updateRevision": "one", "observedGeneration": metadata["generation"]}
            one["status"] = {**counts, **same}
            if "dryRun" not in query:
                self._run(path, one)
        if "dryRun" not in query:
            self.objects[path] = one
        return one

    def _delete(self, path: str) -> Object:
        gone = self.objects.pop(path)
        metadata = gone["metadata"]
        if metadata.get("ownerReferences"):
            self._keep(path, {**gone, "metadata": {**metadata, "uid": None}}, {})
        elif gone["kind"] in SCALED:
            self._run(path, {**gone, "spec": {**gone["spec"], "replicas": 0}})
        details = {"name": metadata["name"], "kind": plural(gone["kind"]), "uid": metadata["uid"]}
        return {"kind": "Status", "apiVersion": "v1", "status": "Success", "details": details}

    def _run(self, path: str, owner: Object) -> None:
        """The pods of a workload, all of them new."""
        place = f"/api/v1/namespaces/{owner['metadata']['namespace']}/pods/{owner['metadata']['name']}"
        for old in [one for one in self.objects if re.fullmatch(rf"{place}-\d+", one)]:
            del self.objects[old]
        for ordinal in range(owner["spec"]["replicas"]):
            name = f"{owner['metadata']['name']}-{ordinal}"
            pod = {"apiVersion": "v1", "kind": "Pod", **copy.deepcopy(owner["spec"]["template"])}
            pod["metadata"] |= {"name": name, "ownerReferences": [{"name": path}]}
            self._keep(f"{place}-{ordinal}", pod, {})

    def _scale(self, method: str, path: str, body: Any) -> tuple[int, Object]:
        if path not in self.objects:
            return _failure(404, "NotFound", path)
        one = self.objects[path]
        if method != "GET":
            one = self._keep(path, merged(one, {"spec": {"replicas": body["spec"]["replicas"]}}), {})
        metadata = {key: one["metadata"][key] for key in ("name", "namespace", "resourceVersion", "uid")}
        size = {"replicas": one["spec"]["replicas"]}
        scale = {"kind": "Scale", "apiVersion": "autoscaling/v1", "metadata": metadata, "spec": size, "status": size}
        return 200, scale

    def _is_collection(self, path: str) -> bool:
        return path.rpartition("/")[2] in {plural(kind) for kinds in KINDS.values() for kind in kinds}

    def _listed(self, path: str, query: dict[str, list[str]]) -> Object:
        group, what = path.split("/namespaces/")[0], path.rpartition("/")[2]
        (kind,) = [kind for kinds in KINDS.values() for kind in kinds if plural(kind) == what]
        wanted = dict(pair.split("=") for text in query.get("labelSelector", []) for pair in text.split(",") if pair)
        name = query.get("fieldSelector", [""])[0].removeprefix("metadata.name=")
        items = [
            one
            for place, one in self.objects.items()
            if place.rpartition("/")[0] == path
            and wanted.items() <= one["metadata"].get("labels", {}).items()
            and name in ("", one["metadata"]["name"])
        ]
        version = group.removeprefix("/apis/").removeprefix("/api/").removesuffix(f"/{what}")
        return {"kind": f"{kind}List", "apiVersion": version, "metadata": {"resourceVersion": "1"}, "items": items}


def _failure(code: int, reason: str, path: str) -> tuple[int, Object]:
    message = f"{path.rpartition('/')[2]}: {reason}"
    kind: Object = {"kind": "Status", "apiVersion": "v1", "status": "Failure"}
    return code, {**kind, "reason": reason, "code": code, "message": message}


@contextmanager
def api_server(cluster: Cluster) -> Iterator[str]:
    """Its URL."""

    class Handler(BaseHTTPRequestHandler):
        def _respond(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            kind = (self.headers.get("Content-Type") or "").partition(";")[0]
            if self.command == "DELETE" or not data:
                body = None
            elif kind.endswith("protobuf"):
                body = decoded(data)
            else:
                body = yaml.load(data, Loader=yaml.CSafeLoader)
            status, found = cluster.answer(self.command, self.path, kind, body)
            data = json.dumps(found).encode() if found else b""
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _respond

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
