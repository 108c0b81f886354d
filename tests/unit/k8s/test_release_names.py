"""Names that a release may have: every object's name is one that Kubernetes takes, or the reason comes first."""

from __future__ import annotations

import re

import pytest
import yaml

from afd.cluster.chart import Render, find_chart, find_helm, render
from afd.errors import ConfigError

try:
    HELM = find_helm()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")


def objects(release: str, namespace: str = "default") -> list[dict[str, object]]:
    text = render(HELM, find_chart(None), Render(release, namespace, {"secret": {"existingSecret": "s"}}))
    return [one for one in yaml.load_all(text, Loader=yaml.CSafeLoader) if one]


@pytest.mark.parametrize(
    "release", ["yes", "null", "on", "y", "e1", "a", "a-b", "x" * 53, "a" * 30 + "-" * 5 + "b" * 18]
)
def test_names_that_yaml_reads_as_something_else_stay_names(release: str) -> None:
    for one in objects(release):
        metadata = one["metadata"]
        assert isinstance(metadata, dict)
        name, labels = metadata["name"], metadata["labels"]
        assert DNS_LABEL.fullmatch(name), name
        assert labels["app.kubernetes.io/instance"] == release
        if one["kind"] == "StatefulSet":
            assert len(f"{name}-0123456789") <= 63, "it labels its pods with its revision's name"


def test_long_names_that_begin_alike_do_not_meet() -> None:
    first, second = ({one["metadata"]["name"] for one in objects("a" * 52 + end)} for end in "xy")
    assert not first & second


@pytest.mark.parametrize(
    "release",
    [
        "my.release",
        "9afd",
        "0123",
        "1e3",
        "Afd",
        "a_b",
        "-a",
        "--help",
        "a-",
        "x" * 54,
        "a b",
        "a\nb",
        "日本",
        "",
        "a: b",
    ],
)
def test_other_names_are_refused_with_the_reason(release: str) -> None:
    with pytest.raises(ConfigError, match="release name") as refusal:
        objects(release)
    assert "\n" not in str(refusal.value) and "execution error" not in str(refusal.value)


@pytest.mark.parametrize("namespace", ["My", "a.b", "a b", "-x", "x" * 64, "a\nb: c"])
def test_namespaces_too(namespace: str) -> None:
    with pytest.raises(ConfigError, match="namespace"):
        objects("afd", namespace)


def test_a_value_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(ConfigError, match="not UTF-8"):
        render(HELM, find_chart(None), Render(values={"model": {"name": "caf\udce9"}}))
