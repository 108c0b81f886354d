"""Reads the data files: chips and models by name, user files on top, prices overridden. The planner's only file I/O."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from afd.errors import ConfigError
from afd.plan.hardware import Chip
from afd.plan.hf_config import shape_from_hf_config
from afd.plan.models import ModelShape

Entry = TypeVar("Entry", Chip, ModelShape)


def load_chips(hardware_files: Sequence[str] = (), prices: Sequence[str] = ()) -> dict[str, Chip]:
    """Chips by name: the shipped ones, then each file's, then `prices` ("h800=2.5", USD per hour)."""
    chips = _load_entries(Chip, "hardware.toml", "--hardware-file", hardware_files)
    for text in prices:
        name, _, value = text.partition("=")
        chip = find(chips, name, "chip")
        try:
            usd = float(value)
        except ValueError:
            raise ConfigError(f"--price {text!r}: expected CHIP=USD, such as h800=2.0") from None
        if not 0 < usd < float("inf"):
            raise ConfigError(f"--price {text!r}: a price must be positive")
        chips[name] = msgspec.structs.replace(chip, usd_per_hour=usd, price_source="--price")
    return chips


def load_models(model_files: Sequence[str] = ()) -> dict[str, ModelShape]:
    """Models by name: the shipped ones, then each file's."""
    return _load_entries(ModelShape, "models.toml", "--model-file", model_files)


def find_model(models: dict[str, ModelShape], name: str) -> ModelShape:
    """A known model by name, or the shape in a Hugging Face config.json (a file, or a folder that holds one)."""
    if name in models:
        return models[name]
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if path.suffix == ".json" or path.is_file():
        return _read_hf_config(path)
    return find(models, name, "model", hint="; a path to a Hugging Face config.json works too")


def find(entries: dict[str, Entry], name: str, noun: str, hint: str = "") -> Entry:
    """`entries[name]`; ConfigError naming what is known."""
    if name not in entries:
        raise ConfigError(f"unknown {noun} {name!r}: known are {', '.join(sorted(entries))}{hint}")
    return entries[name]


def _read_hf_config(path: Path) -> ModelShape:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"model config {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ConfigError(f"model config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"model config {path}: expected a JSON object")
    return shape_from_hf_config(config, name=_config_name(config, path), where=str(path))


def _config_name(config: dict[str, Any], path: Path) -> str:
    """What the config calls itself, else its file, else (config.json) its folder."""
    own = str(config.get("_name_or_path") or "").rstrip("/").rpartition("/")[2]
    stem = path.stem if path.stem != "config" else path.resolve().parent.name
    return own or stem or str(config.get("model_type") or "model")


def _load_entries(cls: type[Entry], shipped: str, option: str, user_files: Sequence[str]) -> dict[str, Entry]:
    text = files("afd.plan").joinpath("data", shipped).read_text(encoding="utf-8")
    entries = _parse(cls, tomllib.loads(text), shipped)
    for name in user_files:
        try:
            table = tomllib.loads(Path(name).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"{option} {name}: {error.strerror or error}") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{option} {name} is not TOML: {error}") from None
        entries.update(_parse(cls, table, f"{option} {name}", entries))
    return entries


def _parse(
    cls: type[Entry], table: dict[str, Any], where: str, known: Mapping[str, Entry] | None = None
) -> dict[str, Entry]:
    """The tables of a file. One of a name in `known` changes the fields that it gives, and no others."""
    entries: dict[str, Entry] = {}
    for name, fields in table.items():
        if not isinstance(fields, dict):
            raise ConfigError(f"{where}: {name!r} must be a table such as [{name}]")
        try:
            former = msgspec.to_builtins(known[name]) if known and name in known else {}
            entries[name] = msgspec.convert({**former, "name": name, **fields}, cls)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{where}: [{name}]: {error}") from None
    return entries
