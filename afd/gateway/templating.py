"""Chat templates: the model's own Jinja source, run in a sandbox (it comes with the weights, not from us).

The environment is that of transformers' `apply_chat_template`: what a template may use there gives the same text here.
Nothing bounds the time of a template in this module: `afd.gateway.template_check` tries it at start where it can be
stopped, and `afd.gateway.intake` runs it in such places.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from afd.errors import RequestError
from afd.model.chat_templates import DEFAULT, TOOL_USE

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]]
BAD_TEMPLATE = "bad_chat_template"
MAX_REASON_CHARS = 500
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")
_GIVEN = frozenset({"messages", "tools", "add_generation_prompt"})


class ChatTemplate:
    """A model's templates, compiled when they are first used. One for all requests.

    sources, special_tokens: what it was made of.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str] | None = None):
        """sources: Jinja by name, of which "default" and "tool_use" count. One that is not valid is refused on use."""
        self.sources = dict(sources)
        self.special_tokens = dict(special_tokens or {})

    @functools.cached_property
    def _compiled(self) -> tuple[dict[str, jinja2.Template], dict[str, str]]:
        """Templates by name, and what is wrong with those that are no templates."""
        environment, sources = _environment(), self.sources
        templates: dict[str, jinja2.Template] = {}
        problems: dict[str, str] = {}
        for name in (DEFAULT, TOOL_USE):
            if name in sources:
                try:
                    templates[name] = environment.from_string(sources[name])
                except Exception as error:  # of foreign code: anything, RecursionError and MemoryError too
                    problems[name] = f"is not valid Jinja: {reason_of(error)}"
        if DEFAULT not in sources:
            problems[DEFAULT] = f"is missing: there are only those named {', '.join(sorted(sources))[:200]}"
        return templates, problems

    def render(
        self,
        messages: Sequence[Message],
        *,
        max_chars: int,
        tools: Tools | None = None,
        add_generation_prompt: bool = True,
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """Messages to prompt text. extra: the client's own variables; they replace none of ours.

        RequestError (400) when the template refuses the messages (roles out of order, ...), when the text is longer
        than `max_chars`, or when the template is not usable (code "bad_chat_template").
        """
        reserved = _GIVEN | self.special_tokens.keys()
        values = {
            "documents": None,
            **{name: value for name, value in (extra or {}).items() if name not in reserved},
            **self.special_tokens,
            "messages": [_as_templates_read(message) for message in messages],
            "tools": tools,
            "add_generation_prompt": add_generation_prompt,
        }
        template = self._choose(tools)
        pieces, num_chars = [], 0
        try:
            for piece in template.generate(values):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > max_chars:
                    break
            text = "".join(pieces)
            text.encode()  # half a surrogate pair is no text, and a template can write one
        except Exception as error:  # of foreign code: anything, RecursionError and MemoryError too
            raise RequestError(
                f"the chat template refuses these messages: {reason_of(error)}", param="messages"
            ) from error
        if num_chars > max_chars:
            raise RequestError(
                f"the chat template makes more than {max_chars} characters of these messages: the context is smaller",
                param="messages",
                code="context_length_exceeded",
            )
        return text

    def _choose(self, tools: Tools | None) -> jinja2.Template:
        templates, problems = self._compiled
        known = templates.keys() | problems.keys()
        name = TOOL_USE if tools is not None and TOOL_USE in known else DEFAULT
        if name in problems:
            which = "chat template" if name == DEFAULT else f"chat template {name!r}"
            raise RequestError(
                f"the model's {which} {problems[name]}; /v1/completions works without it",
                param="messages",
                code=BAD_TEMPLATE,
            )
        return templates[name]


def reason_of(error: Exception) -> str:
    """What a template ran into, in one line that has an end."""
    if isinstance(error, RecursionError):
        return "too deeply nested"
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    return " ".join(str(error).split())[:MAX_REASON_CHARS] or type(error).__name__


def _as_templates_read(message: Message) -> Message:
    """Keys without a value are absent, and reasoning has every name that templates know it by."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in _REASONING_NAMES if name in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message


# --- the environment --------------------------------------------------------------------------------------


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _PlainNamespace
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks what an assistant wrote, for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 as the base class has it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    @staticmethod
    def _content(caller: Any) -> Any:
        return caller()


class _Dict:
    """`dict` without the attributes of the class."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PlainNamespace(Namespace):
    """`namespace` that takes no underscored names."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # "self" may be the name of a value
        values = dict(*args[1:], **kwargs)
        for name in values:
            _check_plain(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_plain(name)
        super().__setitem__(name, value)


def _check_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace has no underscored names such as {name!r}")


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Without Jinja's escapes for HTML; the order of the parameters is that of transformers."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(fmt: str) -> str:
    return datetime.datetime.now().strftime(fmt)
