"""What the gateway must know of the model it serves: names, limits, tokenizer, chat template. No weights, no torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

from afd.config import ModelConfig
from afd.errors import RequestError
from afd.gateway.templating import ChatTemplate
from afd.gateway.tokenizer import TextTokenizer
from afd.model.loading import resolve_model
from afd.model.tokenizer_files import load_tokenizer


@dataclass(frozen=True, slots=True)
class ServedModel:
    """names: the first is what responses say, the others are accepted too.  tokenizer None: token ids only."""

    names: tuple[str, ...]
    vocab_size: int
    max_context: int
    eos_token_ids: tuple[int, ...] = ()
    tokenizer: TextTokenizer | None = None
    template: ChatTemplate | None = None
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
        if self.template is None:
            raise RequestError(
                f"the model {self.name!r} has no chat template: use /v1/completions",
                param="messages",
                code="no_chat_template",
            )
        return self.template


def load_served_model(config: ModelConfig) -> ServedModel:
    """Resolve the configured model; ModelError when it cannot be served."""
    folder = resolve_model(config.name)
    files = load_tokenizer(folder)
    template = None
    if files is not None and files.chat_template is not None:
        template = ChatTemplate(files.chat_template, bos_token=files.bos_token or "", eos_token=files.eos_token or "")
    max_context = folder.spec.max_context
    if config.max_context:
        max_context = min(max_context, config.max_context)
    return ServedModel(
        names=tuple(dict.fromkeys(name for name in (config.served_name, folder.name, config.name) if name)),
        vocab_size=folder.spec.vocab_size,
        max_context=max_context,
        eos_token_ids=tuple(token for token in folder.spec.eos_token_ids if token < folder.spec.vocab_size),
        tokenizer=TextTokenizer(files.tokenizer) if files is not None else None,
        template=template,
        created=int(time.time()),
    )
