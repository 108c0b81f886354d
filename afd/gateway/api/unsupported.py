"""Fields of other servers that this one does not act on: refused by name, unless their value asks for nothing.

An answer that silently leaves out what was asked for (a schema, a salt, a list of bad words) is worse than an error.
Pure.
"""

from __future__ import annotations

from typing import Any

import msgspec

from afd.errors import RequestError

Fields = dict[str, tuple[object, ...]]

# Name -> the values that ask for nothing, beside null. A field leaves this table when `schema` takes it.
_SHARED: Fields = {
    # what the answer must look like
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "regex": (),
    "json_schema": (),
    "ebnf": (),
    "grammar": ("",),
    "format": ("",),
    "stop_regex": ([],),
    "allowed_token_ids": (),
    "bad_words": ([],),
    "thinking_token_budget": (-1,),
    "repetition_detection": (),
    # how it is found
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "typical_p": (1,),
    "repeat_penalty": (1,),
    "mirostat": (0,),
    "dry_multiplier": (0,),
    "xtc_probability": (0,),
    "dynatemp_range": (0,),
    "top_n_sigma": (-1, 0),
    "top_a": (0,),
    "tfs_z": (1,),
    "samplers": (),
    "do_sample": (True,),
    "logits_processors": ([],),
    "custom_logit_processor": (),
    "lora_path": (),
    "lora": ([],),
    # what comes with it
    "prompt_logprobs": (),
    "logprob_token_ids": ([],),
    "return_token_offsets": (False,),
    "return_hidden_states": (False,),
    "n_probs": (0,),
    # what happens to the prompt
    "truncate_prompt_tokens": (),
    "truncation_side": (),
    "cache_salt": (),
    # fields of ours, in other words
    "n_predict": (-1,),
    "num_predict": (-1,),
    "random_seed": (),
    "max_new_tokens": (),
    "min_new_tokens": (0,),
}
# How long a model thinks before it answers, in the words of many servers.
_THINKING: Fields = {"reasoning_effort": (), "reasoning": (), "thinking": (), "enable_thinking": ()}
CHAT: Fields = _SHARED | {
    **_THINKING,
    "include_reasoning": (True,),
    "reasoning_format": ("none", "raw"),
    "reasoning_budget": (-1,),
    "thinking_budget": (),
    "prompt_mode": (),
    "safe_prompt": (False,),
    "web_search_options": (),
    "echo": (False,),
    "best_of": (1,),
    "chat_template": (),
    "documents": ([],),
    "return_prompt_text": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
}
COMPLETION: Fields = _SHARED | {"prompt_embeds": (), "suffix": ("",)}
TOKENIZE: Fields = {"chat_template": (), **_THINKING}

_HINTS = {
    "chat_template": "the model's own is used",
    "documents": "a template that reads them takes them from chat_template_kwargs",
    "max_new_tokens": "it is max_tokens here",
    "min_new_tokens": "it is min_tokens here",
    "n_predict": "it is max_tokens here",
    "repeat_penalty": "it is repetition_penalty here",
    "num_predict": "it is max_tokens here",
    "random_seed": "it is seed here",
    "do_sample": "temperature 0 is greedy",
    **dict.fromkeys(_THINKING, "a template that reads it takes it from chat_template_kwargs"),
}


class UnsupportedFields:
    """Looks for the fields of one table in request bodies."""

    def __init__(self, fields: Fields):
        self.fields = fields
        record = msgspec.defstruct("Record", [(name, Any, None) for name in fields])
        self._decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder(record)

    def check(self, data: bytes) -> None:
        """RequestError (400) with the name of a field that asks for what is not done.

        data: a JSON object.
        """
        record = self._decoder.decode(data)
        for name, harmless in self.fields.items():
            value = getattr(record, name)
            if value is not None and not any(_same(value, other) for other in harmless):
                hint = f": {_HINTS[name]}" if name in _HINTS else ""
                raise RequestError(f"this server does not support {name}{hint}", param=name, code="unsupported")

    def schema(self) -> dict[str, Any]:
        """The fields as JSON schema properties."""
        return {
            name: {"enum": [None, *harmless], "description": "Not supported"} for name, harmless in self.fields.items()
        }


def _same(value: object, other: object) -> bool:
    """Equal as JSON: 1 is not true."""
    return value == other and isinstance(value, bool) == isinstance(other, bool)
