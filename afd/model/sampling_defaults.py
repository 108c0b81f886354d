"""How a model's publisher wants it sampled where a request does not say: generation_config.json, or GGUF metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from afd.errors import ModelError
from afd.model.loading import DEFAULT_MODEL, ModelFolder
from afd.model.model_files import read_json_object
from afd.model.weights.gguf import GgufSource

_FILE = "generation_config.json"
_GGUF_KEYS = {"temp": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p",
              "penalty_repeat": "repetition_penalty"}  # fmt: skip


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values for the fields of that name that a request leaves out; None = nothing is recommended.

    max_tokens: upper bound of an answer whose request gives none.
    """

    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    max_tokens: Annotated[int, Meta(ge=1, le=1 << 31)] | None = None

    def __str__(self) -> str:
        values = {name: value for name, value in dataclasses.asdict(self).items() if value is not None}
        return ", ".join(f"{name} {value:g}" for name, value in values.items())


NO_DEFAULTS = SamplingDefaults()
_OF_DEFAULT_MODEL = SamplingDefaults(temperature=0.2, top_p=0.9)  # its model card; the file itself has none


def sampling_defaults(folder: ModelFolder) -> SamplingDefaults:
    """The recommendation that comes with a model. ModelError names the file and the value that is none.

    As in vLLM, `do_sample` counts for nothing: requests for one greedy text say so with temperature 0.
    """
    if folder.name == DEFAULT_MODEL:
        return _OF_DEFAULT_MODEL
    source = folder.checkpoint.source
    if isinstance(source, GgufSource):
        return defaults_of_gguf(source.metadata, str(folder.path))
    if folder.path is None:
        return NO_DEFAULTS
    config = read_json_object(folder.path, _FILE) or {}
    given = {field.name: config.get(field.name) for field in dataclasses.fields(SamplingDefaults)}
    return _checked({**given, "max_tokens": config.get("max_new_tokens")}, str(folder.path / _FILE))


def defaults_of_gguf(metadata: Mapping[str, Any], where: str) -> SamplingDefaults:
    """The keys general.sampling.*.

    where: the file. ModelError as of `sampling_defaults`.
    """
    return _checked({name: metadata.get(f"general.sampling.{key}") for key, name in _GGUF_KEYS.items()}, where)


def _checked(values: Mapping[str, Any], where: str) -> SamplingDefaults:
    try:
        return msgspec.convert({name: value for name, value in values.items() if value is not None}, SamplingDefaults)
    except msgspec.ValidationError as error:
        problem = str(error).replace(" - at `$.", ": ").rstrip("`")
        raise ModelError(f"{where}: {problem} (gateway.generation_config = none leaves these values alone)") from error
