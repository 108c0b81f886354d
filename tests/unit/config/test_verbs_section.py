"""The section [verbs] and the options of the mesh are one thing under two roofs."""

from __future__ import annotations

import dataclasses

import msgspec

from afd.config import VerbsConfig, resolve_config
from stepmesh.config import VerbsOptions


def test_the_section_has_the_options_fields_and_defaults() -> None:
    assert msgspec.structs.asdict(VerbsConfig()) == dataclasses.asdict(VerbsOptions())


def test_a_value_that_the_section_takes_is_one_that_the_mesh_takes() -> None:
    values = {"verbs.mtu_bytes": 1024, "verbs.traffic_class": 106, "verbs.device": "mlx5_1", "verbs.timeout": 31}
    config = resolve_config(None, values | {"cluster.transport": "verbs"})
    assert VerbsOptions(**msgspec.structs.asdict(config.verbs)).mtu_bytes == 1024
