"""What the gateway must know of the model it serves: names, limits, tokenizer, chat template. No weights, no torch."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import Literal

from afd.config import ModelConfig
from afd.errors import ModelError, RequestError
from afd.gateway.template_check import check_template
from afd.gateway.templating import BAD_TEMPLATE, ChatTemplate
from afd.gateway.tokenizer import TextTokenizer
from afd.model.loading import resolve_model
from afd.model.sampling_defaults import NO_DEFAULTS, SamplingDefaults, sampling_defaults
from afd.model.tokenizer_files import TokenizerFiles, load_tokenizer

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ServedModel:
    """names: the first is what responses say, the others are accepted too.  tokenizer None: token ids only.

    template None: no chat, and template_problem says why if the model has one.
    is_foreign: the template is a program from a stranger, so it runs only where it can be stopped.
    """

    names: tuple[str, ...]
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: TextTokenizer | None = None
    template: ChatTemplate | None = None
    template_problem: str = ""
    sampling_defaults: SamplingDefaults = NO_DEFAULTS
    is_foreign: bool = False
    created: int = 0

    @property
    def name(self) -> str:
        return self.names[0]

    def check_name(self, name: str | None) -> None:
        """RequestError (404) unless `name` is ours; a request without a model ("" too) means ours."""
        if name and name not in self.names:
            raise RequestError(
                f"the model {name!r} does not exist; this server serves {self.name!r}",
                param="model",
                code="model_not_found",
                status=404,
            )

    def need_tokenizer(self, param: str) -> TextTokenizer:
        """RequestError (400) when text cannot be turned into tokens."""
        if self.tokenizer is None:
            raise RequestError(
                f"the model {self.name!r} comes without a tokenizer and serves token ids only: "
                "send /v1/completions a list of token ids as prompt",
                param=param,
                code="no_tokenizer",
            )
        return self.tokenizer

    def need_template(self) -> ChatTemplate:
        """RequestError (400) when chat messages cannot be turned into a prompt."""
        self.need_tokenizer("messages")
        if self.template_problem:
            raise RequestError(self.template_problem, param="messages", code=BAD_TEMPLATE)
        if self.template is None:
            raise RequestError(
                f"the model {self.name!r} has no chat template: use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        return self.template


def load_served_model(config: ModelConfig, generation_config: Literal["auto", "none"] = "auto") -> ServedModel:
    """Resolve the configured model; ModelError when it cannot be served."""
    folder = resolve_model(config.name)
    defaults = sampling_defaults(folder) if generation_config == "auto" else NO_DEFAULTS
    if defaults != NO_DEFAULTS:
        log.info("sampling defaults of this model: %s (gateway.generation_config = none: OpenAI's)", defaults)
    files = load_tokenizer(folder)
    spec = folder.spec
    max_context = min(spec.max_context, config.max_context or spec.max_context)
    named = spec.eos_token_ids + (files.eos_token_ids if files is not None else ())
    eos_token_ids = tuple(dict.fromkeys(token_id for token_id in named if token_id < spec.vocab_size))
    if not eos_token_ids:
        log.warning("no file of the model names an end token: every answer goes on until its limit of tokens")
    template, problem = _template(files)
    return ServedModel(
        names=tuple(dict.fromkeys(name for name in (config.served_name, folder.name, config.name) if name)),
        vocab_size=spec.vocab_size,
        max_context=max_context,
        eos_token_ids=eos_token_ids,
        tokenizer=TextTokenizer(files.tokenizer) if files is not None else None,
        template=template,
        is_foreign=True,
        template_problem=problem,
        sampling_defaults=defaults,
        created=int(time.time()),
    )


def _template(files: TokenizerFiles | None) -> tuple[ChatTemplate | None, str]:
    """(what renders, why nothing does although the model has a template)"""
    if files is None or not files.chat_templates:
        return None, ""
    try:
        check_template(files.chat_templates, files.special_tokens)
    except ModelError as error:
        log.error("chat is not served: %s", error)
        return None, str(error)
    return ChatTemplate(files.chat_templates, files.special_tokens), ""
