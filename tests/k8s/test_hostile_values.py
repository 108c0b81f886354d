"""Every string value of the chart, given what YAML could misread: refused, or rendered to exactly what was given.

The same values are rendered twice, once with a harmless token in each place and once with the hostile string. Whatever
was parsed from the first, with the tokens replaced, is what must be parsed from the second: nothing is read as a number
or a date, cut, folded, or as more YAML.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import cycle
from typing import Any

import jsonschema
import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from afd.errors import ConfigError
from tests.k8s.chart import CHART, Object, render_text
from tests.k8s.value_sets import Values

Path = tuple[str | int, ...]

TOKEN = "tok{}end"
ROLE: Values = {
    "env": [{"name": "TOKEN", "value": TOKEN}],
    "podAnnotations": {"example.com/note": TOKEN},
    "nodeSelector": {"pool": TOKEN},
    "tolerations": [{"key": TOKEN, "operator": "Equal", "value": TOKEN, "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {"note": TOKEN}},
    "podLabels": {"team": TOKEN},
    "priorityClassName": TOKEN,
    "schedulerName": TOKEN,
    "runtimeClassName": TOKEN,
    "image": {"repository": TOKEN, "tag": TOKEN},
    "lifecycle": {"postStart": {"exec": {"command": [TOKEN]}}},
    "extraContainers": [{"name": "beside", "image": TOKEN, "args": [TOKEN]}],
}
INIT: Values = {"initContainers": [{"name": "init", "image": TOKEN, "args": [TOKEN, TOKEN]}]}
WORKER: Values = {**ROLE, **INIT, "gpu": {"resource": f"example.com/{TOKEN}"}}
FULL: Values = {
    "topology": "2A2F",
    "model": {
        "name": f"/models/{TOKEN}",
        "servedName": TOKEN,
        "download": {"image": "a/b:1", "command": [TOKEN], "args": [TOKEN], "env": [{"name": "TOKEN", "value": TOKEN}]},
    },
    "image": {"repository": TOKEN, "tag": TOKEN},
    "imagePullSecrets": [{"name": TOKEN}],
    "config": {"attention": {"cores": TOKEN}, "gateway": {"advertise_host": TOKEN}},
    "secret": {"existingSecret": TOKEN},
    "apiKeys": True,
    "tls": {"enabled": True, "secretName": TOKEN},
    "gateway": {
        **ROLE,
        "service": {"annotations": {"example.com/note": TOKEN}},
        "ingress": {
            "enabled": True,
            "host": TOKEN,
            "className": TOKEN,
            "tlsSecretName": TOKEN,
            "annotations": {"example.com/note": TOKEN},
        },
        "httpRoute": {"enabled": True, "parentRefs": [{"name": TOKEN}], "hostnames": [TOKEN]},
        "inferencePool": {"enabled": True, "endpointPicker": TOKEN},
    },
    "coordinator": ROLE,
    "attention": {**WORKER, "resourceClaims": [{"name": TOKEN, "resourceClaimName": TOKEN}]},
    "ffn": {**WORKER, "resourceClaims": [{"name": TOKEN, "resourceClaimTemplateName": TOKEN}]},
    "pods": {"env": [{"name": "COMMON", "value": TOKEN}], "podAnnotations": {"example.com/common": TOKEN}},
    "serviceAccount": {"name": TOKEN},
    "queueName": TOKEN,
    "gpu": {"resource": f"example.com/{TOKEN}"},
    "rdma": {"enabled": True, "resource": f"example.com/{TOKEN}", "env": [{"name": "TOKEN", "value": TOKEN}]},
    "placement": {"topologyKey": TOKEN},
    "networkPolicy": {
        "clientsFrom": [{"podSelector": {"matchLabels": {"app": TOKEN}}}],
        "egressTo": [{"to": [{"podSelector": {"matchLabels": {"app": TOKEN}}}]}],
    },
    "monitoring": {"serviceMonitor": True, "prometheusRule": True, "dashboard": True, "labels": {"release": TOKEN}},
    "autoscale": {**ROLE, "enabled": True},
    "device": "cuda",
}
VOLUMES: dict[str, Values] = {
    "statefulsets": {"pvc": {"claimName": TOKEN}},
    "disaggregatedset": {"hostPath": {"path": f"/{TOKEN}"}},
}
SCALERS: dict[str, Values] = {
    "statefulsets": {"hpa": {"enabled": True, "metric": TOKEN}},
    "disaggregatedset": {"keda": {"enabled": True, "serverAddress": TOKEN, "query": TOKEN}},
}
# The same definitions hold for these keys wherever they stand.
ROLES = {"gateway", "coordinator", "attention", "ffn", "autoscale", "pods"}
HOSTILE = (
    *("yes", "No", "on", "y", "null", "~", "true", "0123", "0x1f", "0o17", "1e3", "1_000", ".5", "12:30:45", "1.0"),
    *(
        "2026-11-30",
        "=",
        "<<",
        "a: b",
        "a #b",
        "- a",
        "-",
        "---",
        "...",
        "{a: b}",
        "[a]",
        "a, b",
        "&a",
        "*a",
        "!a",
        "|",
    ),
    *(">", "%a", "@a", "`a`", "'", '"', "it's", 'say "hi"', "a\\nb", "\\", "$(POD_IP)", "${A}", "{{ .Values }}"),
    *(
        " leading",
        "trailing ",
        "\tx",
        "a\nb",
        "a\n\n  b\n",
        "\na",
        "  a\n b",
        "a\r\nb",
        "\x7f",
        "\x85",
        "\u2028",
        "\ufeff",
    ),
    *("日本 🎉", "e\u0301", "x" * 63, "word " * 60, "a\n" + "word " * 40, "..", "a/b", "registry:5000/a/b"),
)


class Kubernetes(yaml.SafeLoader):
    """Kubernetes reads "=" and, as a value, "<<" as strings."""


Kubernetes.yaml_implicit_resolvers = {
    first: [one for one in resolvers if one[0] not in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def places(values: Any, path: Path = ()) -> Iterator[Path]:
    """Where a token is."""
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from places(value, (*path, key))
    elif isinstance(values, str) and TOKEN in values:
        yield path


def value_at(values: Any, path: Path) -> Any:
    for step in path:
        values = values[step]
    return values


def put(values: Values, path: Path, text: str) -> None:
    here, last = value_at(values, path[:-1]), path[-1]
    here[last] = here[last].replace(TOKEN, text)


def mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {change(key): mapped(one, change) for key, one in value.items()}
    if isinstance(value, list):
        return [mapped(one, change) for one in value]
    return change(value) if isinstance(value, str) else value


def objects(values: Values) -> list[Object]:
    """What is parsed, the configuration file too, but for the sums over it."""
    found = [one for one in yaml.load_all(render_text(values), Loader=Kubernetes) if one]
    for one in found:
        if "afd.toml" in one.get("data", {}):
            one["data"]["afd.toml"] = tomllib.loads(one["data"]["afd.toml"])
    return without_sums(found)


SUMS = ("checksum/config", "afd/agreed")


def without_sums(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_sums(one) for key, one in value.items() if key not in SUMS}
    return [without_sums(one) for one in value] if isinstance(value, list) else value


SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def full(shape: str) -> Values:
    model = {**FULL["model"], "volume": VOLUMES[shape]}
    attention = {**FULL["attention"], **SCALERS[shape]}
    return copy.deepcopy({**FULL, "shape": shape, "model": model, "attention": attention})


def whole_pattern(validator: Any, pattern: str, text: Any, schema: Any) -> Iterator[jsonschema.ValidationError]:
    """Go's "$" does not match before a line's end, as Python's does."""
    if isinstance(text, str) and not re.search(re.sub(r"\$$", r"\\Z", pattern), text):
        yield jsonschema.ValidationError(f"{text!r} does not match {pattern!r}")


Validator = jsonschema.validators.extend(jsonschema.Draft7Validator, {"pattern": whole_pattern})


@cache
def leaf_validator(path: Path) -> Any:
    """For the one string there."""
    schema = SCHEMA
    for step in path:
        while "$ref" in schema or "allOf" in schema:
            reference = schema["$ref"] if "$ref" in schema else schema["allOf"][0]["$ref"]
            schema = SCHEMA["definitions"][reference.rpartition("/")[2]]
        below = schema.get("items") if isinstance(step, int) else schema.get("properties", {}).get(step)
        schema = below if below is not None else schema["additionalProperties"]
    return Validator({"allOf": [schema], "definitions": SCHEMA["definitions"]})


@cache
def harmless(shape: str) -> list[Object]:
    values = full(shape)
    for idx, path in enumerate(places(full(shape))):
        put(values, path, f"tok{idx}end")
    return objects(values)


def check(texts: Sequence[str], shape: str) -> None:
    """texts: one for each place in turn, where the schema takes it."""
    values = full(shape)
    given = {}
    for idx, (path, text) in enumerate(zip(places(full(shape)), cycle(texts), strict=False)):
        whole = value_at(values, path).replace(TOKEN, text)
        token = f"tok{idx}end"
        given[token] = text if leaf_validator(path).is_valid(whole) else token
        put(values, path, given[token])
    assert any(token != text for token, text in given.items())
    expected = mapped(harmless(shape), lambda one: re.sub(r"tok\d+end", lambda match: given[match.group()], one))
    assert expected == objects(values)


ROUNDS = len(HOSTILE) if os.environ.get("AFD_FUZZ") == "full" else 10
STRIDE = 7
"""Between the strings that a place gets in one round and the next."""


@pytest.mark.parametrize("turn", range(ROUNDS))
@pytest.mark.parametrize("shape", VOLUMES)
def test_a_string_is_that_string_or_refused(shape: str, turn: int) -> None:
    start = turn * STRIDE % len(HOSTILE)
    check(HOSTILE[start:] + HOSTILE[:start], shape)


@settings(max_examples=8, deadline=None, derandomize=True, phases=[Phase.generate])
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1), min_size=20))
def test_any_text(texts: list[str]) -> None:
    check(texts, "statefulsets")


def test_every_string_of_the_values_is_in_the_test() -> None:
    """A new value of type string must come into FULL, be an enumeration, or have a pattern too narrow for mischief."""
    tested = {tuple("[]" if isinstance(step, int) else step for step in path) for path in places(full("statefulsets"))}
    tested |= {
        tuple("[]" if isinstance(step, int) else step for step in path) for path in places(full("disaggregatedset"))
    }
    tested |= {("pods", *path[1:]) for path in tested if path[0] in ROLES}
    missing = []
    for path in free_strings(SCHEMA):
        anywhere = ("pods", *path[1:]) if path[0] in ROLES else path
        # A section's strings are all lines; two of them are in FULL.
        if not tested & {path, anywhere} and path[-3:] != ("env", "[]", "name") and path[0] != "config":
            missing.append(path)
    assert not missing
    assert {json.dumps(one) for one in config_strings()} == {json.dumps({"$ref": "#/definitions/line"})}


def config_strings() -> Iterator[Any]:
    for section in SCHEMA["properties"]["config"]["properties"].values():
        for key in section["properties"].values():
            if "enum" not in key and key.get("type") not in ("integer", "number", "boolean"):
                yield key


def free_strings(schema: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the schema's strings that take "a"."""
    if "$ref" in schema:
        yield from free_strings(SCHEMA["definitions"][schema["$ref"].rpartition("/")[2]], path)
        return
    for key, below in schema.get("properties", {}).items():
        yield from free_strings(below, (*path, key))
    if "items" in schema and schema is not SCHEMA["definitions"]["free"]:
        yield from free_strings(schema["items"], (*path, "[]"))
    is_string = schema.get("type") == "string" or (schema.get("type") is None and "allOf" in schema)
    if is_string and jsonschema.Draft7Validator({**schema, "definitions": SCHEMA["definitions"]}).is_valid("a"):
        yield path


@pytest.mark.parametrize(
    "values",
    [
        {"secret": {"existingSecret": "My Secret"}},
        {"image": {"repository": "a b"}},
        {"image": {"tag": "a:b"}},
        {"gateway": {"ingress": {"enabled": True, "host": "a b"}}},
        {"gateway": {"nodeSelector": {"pool": "a b"}}},
        {"gateway": {"podAnnotations": {"a b": "x"}}},
        {"gateway": {"podAnnotations": {"n": 5}}},
        {"gateway": {"env": [{"name": "A=B", "value": "x"}]}},
        {"model": {"name": "a\nb"}},
        {"model": {"mountPath": "/a:b"}},
        {"config": {"attention": {"cores": "a\u2028b"}}},
        {"config": {"attention": {"cores": ["0"]}}},
        {"config": {"attention": {"a = 1\nb": 1}}},
        {"attention": {"affinity": {"note": ["a\x07"]}}},
        {"attention": {"hpa": {"averageValue": "many"}}},
        {"monitoring": {"labels": {"release": "x" * 64}}},
    ],
    ids=ascii,
)
def test_what_kubernetes_would_refuse_is_refused_first(values: Values) -> None:
    with pytest.raises(ConfigError, match="values don't meet the specifications of the schema") as refusal:
        render_text(values)
    assert "\n" not in str(refusal.value)


def test_own_labels_and_annotations_are_not_given_twice() -> None:
    own: Values = {
        "gateway": {"podAnnotations": {"checksum/config": "mine"}},
        "monitoring": {"serviceMonitor": True, "labels": {"app.kubernetes.io/name": "mine"}},
    }
    assert "mine" not in render_text(own)
