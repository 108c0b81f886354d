"""What the chart's schema repeats of the program: `python -m tests.k8s.config_schema` writes it anew.

The keys under `config` with their types and limits, and the names of models that need no files.
"""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec

from afd.config import ClusterConfig
from afd.model.loading import DEFAULT_MODEL
from afd.model.presets import PRESETS
from tests.k8s.chart import CHART

PATH = CHART / "values.schema.json"
WIDTH = 140
LINE = {"$ref": "#/definitions/line"}


def config_schema() -> dict[str, Any]:
    """The schema of .Values.config: sections and keys of the configuration file."""
    whole = msgspec.json.schema(ClusterConfig)
    definitions = whole["$defs"]

    def resolved(node: dict[str, Any]) -> dict[str, Any]:
        reference = node.get("$ref", "").rpartition("/")[2]
        return definitions[reference] if reference else node

    sections = {}
    for section in resolved(whole)["properties"]:
        keys = {}
        for key, node in resolved(definitions[_class(whole, section)])["properties"].items():
            found = resolved(node)
            kept = {word: value for word, value in found.items() if word not in ("default", "title", "description")}
            keys[key] = LINE if kept == {"type": "string"} else kept
        sections[section] = {"type": "object", "additionalProperties": False, "properties": keys}
    return {"type": "object", "additionalProperties": False, "properties": sections}


def _class(whole: dict[str, Any], section: str) -> str:
    properties = whole["$defs"]["ClusterConfig"]["properties"]
    node = properties[section]
    reference = node.get("$ref") or node["anyOf"][0]["$ref"]
    return str(reference).rpartition("/")[2]


def model_names() -> str:
    """A pattern: the built-in model, a preset, or a path in the pods."""
    presets = "|".join(re.escape(name) for name in PRESETS)
    return f"^({re.escape(DEFAULT_MODEL)}|dummy:({presets})|/.+)$".replace("\\-", "-")


def updated(schema: dict[str, Any]) -> dict[str, Any]:
    schema["properties"]["config"] = config_schema()
    schema["properties"]["model"]["properties"]["name"] = {
        "description": "The built-in model, dummy:PRESET, or a path under model.mountPath.",
        "allOf": [LINE],
        "pattern": model_names(),
    }
    return schema


def written(node: Any, indent: int = 0) -> str:
    """JSON with what fits on a line on one line."""
    flat = json.dumps(node)
    if not isinstance(node, dict | list) or len(flat) + indent + 30 <= WIDTH or not node:
        return flat
    pad = " " * (indent + 2)
    if isinstance(node, dict):
        parts = [f"{pad}{json.dumps(key)}: {written(value, indent + 2)}" for key, value in node.items()]
    else:
        parts = [f"{pad}{written(value, indent + 2)}" for value in node]
    opening, closing = "{}" if isinstance(node, dict) else "[]"
    return opening + "\n" + ",\n".join(parts) + "\n" + " " * indent + closing


def main() -> None:
    PATH.write_text(written(updated(json.loads(PATH.read_text()))) + "\n")


if __name__ == "__main__":
    main()
