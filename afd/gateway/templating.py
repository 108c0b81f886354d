"""Chat templates: the model's own Jinja source, run in a sandbox (it comes with the weights, not from us)."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from afd.errors import ModelError, RequestError

Message = dict[str, Any]
_RESERVED = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token"})

# What a template's code can run into; RecursionError: values nested deeper than `tojson` can write.
_REFUSALS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _strftime_now(fmt: str) -> str:
    return datetime.datetime.now().strftime(fmt)


class ChatTemplate:
    """A compiled template. Immutable: one for all requests."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = ""):
        """ModelError when the source is not valid Jinja."""
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._special = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelError(f"the model's chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages -> prompt text. RequestError (400) when the template refuses them (roles out of order, ...)."""
        values = {name: value for name, value in (extra or {}).items() if name not in _RESERVED}
        try:
            return self._template.render(
                **values, **self._special, messages=messages, add_generation_prompt=add_generation_prompt
            )
        except _REFUSALS as error:
            raise RequestError(f"the chat template refuses these messages: {error}", param="messages") from error
