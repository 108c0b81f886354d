"""The chart rendered for tests, and where things are in what it renders."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from afd.cluster.chart import Render, find_chart, find_helm, render
from tests.k8s.value_sets import VALUE_SETS, Values

Object = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[2]
CHART = find_chart(None)
RELEASE, NAMESPACE = "afd", "demo"
ROLES = ("gateway", "coordinator", "attention", "ffn", "autoscale")


def render_text(values: Values, *, release: str = RELEASE, namespace: str = NAMESPACE) -> str:
    """What helm prints; ConfigError with its words when the chart refuses the values."""
    return render(find_helm(), CHART, Render(release, namespace, values))


def render_values(values: Values, *, release: str = RELEASE, namespace: str = NAMESPACE) -> list[Object]:
    """Every object."""
    text = render_text(values, release=release, namespace=namespace)
    return [one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one]


@cache
def rendered(name: str) -> tuple[Object, ...]:
    """The objects of a value set. Shared by tests: not to be changed."""
    return tuple(render_values(VALUE_SETS[name]))


def of_kind(objects: tuple[Object, ...], kind: str) -> list[Object]:
    return [one for one in objects if one["kind"] == kind]


def named(objects: tuple[Object, ...], kind: str, name: str) -> Object:
    """The one object of this kind and name."""
    (found,) = [one for one in of_kind(objects, kind) if one["metadata"]["name"] == name]
    return found


def pod_templates(objects: tuple[Object, ...]) -> Iterator[tuple[str, Object]]:
    """(role, pod template) of every workload."""
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet"):
            template = one["spec"]["template"]
            yield template["metadata"]["labels"]["app.kubernetes.io/component"], template
        elif one["kind"] == "DisaggregatedSet":
            for role in one["spec"]["roles"]:
                yield role["name"], role["spec"]["leaderWorkerTemplate"]["workerTemplate"]


def config_text(objects: tuple[Object, ...], role: str) -> str:
    """The configuration file that a role's pods mount."""
    ((text,),) = [
        one["data"].values()
        for one in of_kind(objects, "ConfigMap")
        if one["metadata"]["name"].endswith(f"-config-{role}")
    ]
    assert isinstance(text, str)
    return text
