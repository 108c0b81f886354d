"""Makes a `GenerationJob` of a decoded body: defaults, limits and rules that span fields. Pure.

Every refusal is a RequestError (400) with the parameter's name.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Mapping
from typing import Any

import msgspec

from afd.config import GatewayConfig
from afd.errors import RequestError
from afd.gateway.api.schema import ChatBody, ChatMessage, CompletionBody, SamplingBody
from afd.gateway.generation import GenerationJob
from afd.gateway.served_model import ServedModel
from afd.gateway.templating import Message
from afd.types import SamplingParams

CONTEXT_EXCEEDED = "context_length_exceeded"
DEFAULT_COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGIT_BIAS = 1024
MAX_LOGIT_BIAS_VALUE = 100.0
_TEXT_PARTS = ("text", "input_text", "output_text")  # the last two are those of the Responses API


def chat_job(
    body: ChatBody, prompt_ids: list[int], headers: Mapping[str, str], model: ServedModel, limits: GatewayConfig
) -> GenerationJob:
    """Chat: output may fill the context unless max_(completion_)tokens says otherwise."""
    if body.top_logprobs and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs to be true", param="top_logprobs")
    if body.tools and body.tool_choice != "none":
        raise RequestError("this server does not support tools", param="tools", code="unsupported")
    if body.tool_choice not in (None, "none"):
        raise RequestError("tool_choice needs tools, which this server does not support", param="tool_choice")
    logprobs = (body.top_logprobs or 0) if body.logprobs else -1
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    num_room = _room(len(prompt_ids), model, "messages")
    return _job(body, [(prompt_ids, num_room)], max_tokens, logprobs, headers, model, limits)


def completion_job(
    body: CompletionBody,
    prompts: list[list[int]],
    headers: Mapping[str, str],
    model: ServedModel,
    limits: GatewayConfig,
) -> GenerationJob:
    """Text completions: each prompt by itself."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("this server does not support best_of other than n", param="best_of", code="unsupported")
    if body.echo and body.logprobs is not None:
        raise RequestError("echo with logprobs needs log-probabilities of the prompt: unsupported", param="echo")
    rooms = [(prompt, _room(len(prompt), model, "prompt")) for prompt in prompts]
    max_tokens = body.max_tokens
    if max_tokens is None:
        rooms = [(prompt, min(room, DEFAULT_COMPLETION_TOKENS)) for prompt, room in rooms]
    logprobs = body.logprobs if body.logprobs is not None else -1
    return _job(body, rooms, max_tokens, logprobs, headers, model, limits)


def split_prompts(prompt: str | list[str | int | list[int]]) -> list[str | list[int]]:
    """The four forms of a completion's prompt as a list of texts or of token id lists."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise RequestError("prompt is empty", param="prompt")
    token_ids = [item for item in prompt if isinstance(item, int)]
    if len(token_ids) == len(prompt):
        return [token_ids]
    prompts = [item for item in prompt if not isinstance(item, int)]
    if len({type(item) for item in prompt}) > 1:
        raise RequestError("prompt mixes texts, token ids and lists", param="prompt")
    return prompts


def check_token_ids(ids: list[int], model: ServedModel, param: str) -> list[int]:
    """RequestError for an id outside the vocabulary."""
    if ids and max(ids) >= model.vocab_size:
        raise RequestError(f"token id {max(ids)} is outside the vocabulary (0 to {model.vocab_size - 1})", param=param)
    return ids


def max_prompt_chars(model: ServedModel, param: str) -> int:
    """Characters of a text beyond which it cannot fit the context whatever its tokens are."""
    return model.max_context * model.need_tokenizer(param).max_token_chars


def check_num_messages(messages: list[ChatMessage], model: ServedModel) -> None:
    """Refuse, before the template runs, what cannot fit: each message takes a token."""
    if len(messages) > model.max_context:
        raise too_long(f"{len(messages)} messages", model, "messages")


def check_num_sequences(body: SamplingBody, num_prompts: int, limits: GatewayConfig) -> int:
    """Choices per prompt. Refuses, before any prompt is looked at, more than the queue could ever hold."""
    num_choices = body.n or 1
    if num_choices > limits.max_n:
        raise RequestError(f"n is {num_choices}; at most {limits.max_n} (gateway.max_n)", param="n")
    num_sequences = num_choices * num_prompts
    if num_sequences > limits.max_queue:
        raise RequestError(
            f"{num_prompts} prompts with n = {num_choices} are {num_sequences} sequences; "
            f"at most {limits.max_queue} (gateway.max_queue)",
            param="prompt",
        )
    return num_choices


def max_prompt_tokens(model: ServedModel, limits: GatewayConfig) -> int:
    """Tokens of all prompts of one request together."""
    return max(limits.max_request_tokens, model.max_context)


def template_messages(messages: list[ChatMessage]) -> list[Message]:
    """Messages as the dicts that chat templates expect; parts of text are joined, anything else is refused."""
    rendered = []
    for message_idx, message in enumerate(messages):
        entry: Message = {"role": "system" if message.role == "developer" else message.role}
        if isinstance(message.content, list):
            texts = []
            for part_idx, part in enumerate(message.content):
                if part.type not in _TEXT_PARTS or part.text is None:
                    kind = {"image_url": "image", "input_image": "image"}.get(part.type, part.type)
                    raise RequestError(
                        f"this model takes text only: it cannot read content of type {kind!r}",
                        param=f"messages[{message_idx}].content[{part_idx}]",
                        code="unsupported_content",
                    )
                texts.append(part.text)
            entry["content"] = "\n".join(texts)
        else:
            entry["content"] = message.content if message.content is not None else ""
        for name in ("name", "tool_call_id"):
            value = getattr(message, name)
            if value is not None:
                entry[name] = value
        if message.tool_calls:
            entry["tool_calls"] = _tool_calls(message.tool_calls, f"messages[{message_idx}].tool_calls")
        reasoning = message.reasoning if message.reasoning is not None else message.reasoning_content
        if reasoning is not None:
            entry["reasoning"] = entry["reasoning_content"] = reasoning
        rendered.append(entry)
    return rendered


def _tool_calls(calls: list[dict[str, Any]], param: str) -> list[dict[str, Any]]:
    """Calls of the history with `arguments` as the mapping that templates iterate, where OpenAI's form is JSON text.

    Arguments that are no JSON object become an empty one, as vLLM has it: the model wrote them, and a refusal would end
    the conversation for good.
    """
    decoded = []
    for call_idx, call in enumerate(calls):
        function = call.get("function")
        if call.get("type", "function") != "function" or not isinstance(function, dict):
            raise RequestError("only calls of type 'function' can be in a history", param=f"{param}[{call_idx}]")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            with contextlib.suppress(msgspec.DecodeError, RecursionError):
                arguments = msgspec.json.decode(arguments)
        function = {**function, "arguments": arguments if isinstance(arguments, dict) else {}}
        decoded.append({**call, "function": function})
    return decoded


def _room(num_prompt_tokens: int, model: ServedModel, param: str) -> int:
    """Tokens of output that fit behind the prompt."""
    if num_prompt_tokens == 0:
        raise RequestError("the prompt has no tokens", param=param)
    if num_prompt_tokens >= model.max_context:
        raise too_long(f"{num_prompt_tokens} tokens", model, param)
    return model.max_context - num_prompt_tokens


def too_long(size: str, model: ServedModel, param: str) -> RequestError:
    """The refusal of a prompt of that size."""
    # OpenAI's words: clients that can go to a longer model look for them (litellm and others).
    return RequestError(
        f"This model's maximum context length is {model.max_context} tokens. However, your prompt has {size}, "
        "and the output needs room too. Please reduce the length of the prompt.",
        param=param,
        code=CONTEXT_EXCEEDED,
    )


def _job(
    body: SamplingBody,
    rooms: list[tuple[list[int], int]],
    max_tokens: int | None,
    logprobs: int,
    headers: Mapping[str, str],
    model: ServedModel,
    limits: GatewayConfig,
) -> GenerationJob:
    """rooms: (prompt ids, most output tokens) of each prompt. A max_tokens above that is cut: it is a bound."""
    if body.response_format is not None and body.response_format.get("type", "text") != "text":
        raise RequestError(
            "this server does not support structured output; only response_format type 'text'",
            param="response_format",
            code="unsupported",
        )
    num_choices = check_num_sequences(body, len(rooms), limits)
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true", param="stream_options")
    if len(body.stop_token_ids or []) > MAX_STOP_TOKEN_IDS:
        raise RequestError(f"at most {MAX_STOP_TOKEN_IDS} stop_token_ids", param="stop_token_ids")
    own_stop_ids = tuple(dict.fromkeys(check_token_ids(body.stop_token_ids or [], model, "stop_token_ids")))
    seed = body.seed if body.seed is not None else secrets.randbits(63)
    bias = _logit_bias(body.logit_bias or {}, model)
    num_tokens = num_choices * sum(len(prompt_ids) + len(bias) for prompt_ids, _ in rooms)
    if num_tokens > max_prompt_tokens(model, limits):
        raise RequestError(
            f"{len(rooms)} prompts with n = {num_choices} have {num_tokens} tokens, entries of logit_bias included; "
            f"at most {max_prompt_tokens(model, limits)} (gateway.max_request_tokens)",
            param="prompt",
        )
    prompts = []
    defaults = model.sampling_defaults
    for prompt_ids, room in rooms:
        num_room = room if max_tokens is not None else min(room, defaults.max_tokens or room)
        check_token_ids(prompt_ids, model, "prompt")
        num_output = num_room if max_tokens is None else min(max_tokens, num_room)
        if (body.min_tokens or 0) > num_output:
            raise RequestError(f"min_tokens is more than the {num_output} tokens of output allowed", param="min_tokens")
        sampling = SamplingParams(
            max_tokens=num_output,
            seed=seed,
            temperature=_given(body.temperature, defaults.temperature, 1.0),
            top_p=_given(body.top_p, defaults.top_p, 1.0),
            top_k=max(0, int(_given(body.top_k, defaults.top_k, 0))),
            min_p=_given(body.min_p, defaults.min_p, 0.0),
            stop_token_ids=tuple(dict.fromkeys(own_stop_ids + (() if body.ignore_eos else model.eos_token_ids))),
            min_tokens=body.min_tokens or 0,
            presence_penalty=body.presence_penalty or 0.0,
            frequency_penalty=body.frequency_penalty or 0.0,
            repetition_penalty=_given(body.repetition_penalty, defaults.repetition_penalty, 1.0),
            logit_bias=bias,
            logprobs=logprobs,
        )
        prompts.append((prompt_ids, sampling))
    tpot_ms = _header_ms(headers, "x-sla-tpot-ms")
    return GenerationJob(
        prompts=prompts,
        num_choices=num_choices,
        stops=_stops(body.stop, model, limits),
        include_stop=bool(body.include_stop_str_in_output),
        own_stop_ids=own_stop_ids,
        skip_special_tokens=body.skip_special_tokens is not False,
        priority=body.priority or 0,
        ttft_s=own_ttft_s(headers),
        tpot_s=0.0 if tpot_ms is None else tpot_ms / 1e3,
    )


def _given(value: float | None, recommended: float | None, default: float) -> float:
    """The request's value, else the model's, else OpenAI's."""
    return next(number for number in (value, recommended, default) if number is not None)


def _stops(stop: str | list[str] | None, model: ServedModel, limits: GatewayConfig) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else stop or []
    if not stops:
        return ()
    model.need_tokenizer("stop")
    if len(stops) > limits.max_stop:
        raise RequestError(f"{len(stops)} stop strings; at most {limits.max_stop} (gateway.max_stop)", param="stop")
    if not all(stops):
        raise RequestError("a stop string is empty", param="stop")
    if max(len(text) for text in stops) > MAX_STOP_CHARS:
        raise RequestError(f"a stop string is longer than {MAX_STOP_CHARS} characters", param="stop")
    return tuple(dict.fromkeys(stops))


def _logit_bias(bias: dict[str, float], model: ServedModel) -> tuple[tuple[int, float], ...]:
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(f"logit_bias has {len(bias)} entries; at most {MAX_LOGIT_BIAS}", param="logit_bias")
    pairs = []
    for key, value in bias.items():
        # One spelling of each id: "5" and "05" would be two wishes for one token.
        if not (
            key.isascii() and key.isdigit() and len(key) < 10 and str(int(key)) == key and int(key) < model.vocab_size
        ):
            raise RequestError(f"logit_bias key {key[:32]!r} is not a token id of this model", param="logit_bias")
        if abs(value) > MAX_LOGIT_BIAS_VALUE:
            raise RequestError("logit_bias values lie between -100 and 100", param="logit_bias")
        pairs.append((int(key), value))
    return tuple(pairs)


def own_ttft_s(headers: Mapping[str, str]) -> float | None:
    """The request's own target of its first token; None = the cluster's. RequestError."""
    ttft_ms = _header_ms(headers, "x-sla-ttft-ms")
    return None if ttft_ms is None else ttft_ms / 1e3


def _header_ms(headers: Mapping[str, str], name: str) -> float | None:
    """A request's own SLA target in milliseconds."""
    text = headers.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1e7:
        raise RequestError(f"header {name} is {text[:32]!r}; expected milliseconds above 0", param=name)
    return value
