"""Small served models for gateway tests: a byte-level vocabulary with a few merges and special tokens."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from afd.gateway.served_model import ServedModel
from afd.gateway.templating import ChatTemplate
from afd.gateway.tokenizer import TextTokenizer

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ġw", "o")]


def byte_tokenizer() -> Tokenizer:
    """256 byte tokens, six merges, then <|start|> and <|end|>."""
    tokens = sorted(ByteLevel.alphabet()) + [left + right for left, right in MERGES]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, MERGES))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.add_special_tokens([AddedToken("<|start|>", special=True), AddedToken("<|end|>", special=True)])
    return tokenizer


def text_model(max_context: int = 256) -> ServedModel:
    """A chat model with text."""
    tokenizer = byte_tokenizer()
    return ServedModel(
        names=("tiny", "tiny-alias"),
        vocab_size=tokenizer.get_vocab_size(),
        max_context=max_context,
        eos_token_ids=(tokenizer.token_to_id("<|end|>"),),
        tokenizer=TextTokenizer(tokenizer),
        template=ChatTemplate({"default": TEMPLATE}),
        created=1,
    )


def ids_model(max_context: int = 256) -> ServedModel:
    """A model without a tokenizer."""
    return ServedModel(names=("ids-only",), vocab_size=200, max_context=max_context, eos_token_ids=(199,), created=1)
