"""Nouns shared by every role: sampling parameters, topology, finish reasons. Plain values, no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from afd.errors import ConfigError


def host_port(host: str, port: int | str) -> str:
    """ "host:port"; an IPv6 address stands in brackets."""
    return f"[{host}]:{port}" if ":" in host and not host.startswith("[") else f"{host}:{port}"


class FinishReason(StrEnum):
    """Why a request ended. STOP and LENGTH are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class FfnParallel(StrEnum):
    """How an FFN layer is cut over the FFN ranks."""

    HYBRID = "hybrid"  # routed experts whole per rank (EP); dense FFN and shared expert sliced (TP)
    TP = "tp"  # everything sliced along the intermediate dimension
    EP = "ep"  # routed experts whole per rank; shared expert whole, for rows t mod y


class DispatchMode(StrEnum):
    """Which rows of a micro-batch an FFN rank is sent at an MoE layer (at a dense one it is sent all)."""

    BROADCAST = "broadcast"  # all
    SPARSE = "sparse"  # those that its experts, or its share of the shared expert, work on


MAX_STREAMS = 4  # places in the pipeline of an attention worker
MAX_LOGPROBS = 20
MIN_TEMPERATURE = 1e-5  # below, no second token has a chance, and float32 could not even divide by it


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request's tokens are drawn. The seed is always set (the gateway draws one if none is given).

    temperature: 0 (or next to it) = greedy.
    top_k: 0 = off.
    logprobs: -1 = none, k >= 0 = sampled token plus top k.
    stop_token_ids: ends the request when sampled (the model's EOS ids are already in it unless ignore_eos).
    choice: index among the `n` choices of one HTTP request; part of the sampler's key.
    """

    max_tokens: int
    seed: int
    choice: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int = -1

    def fault(self, vocab_size: int) -> str | None:
        """Why no sampler can use these values, in one line; None when it can. NaN is in no range."""
        ranges = (
            ("temperature", self.temperature, 0.0, 100.0),
            ("top_p", self.top_p, 1e-300, 1.0),
            ("top_k", self.top_k, 0, 1 << 31),
            ("min_p", self.min_p, 0.0, 1.0),
            ("min_tokens", self.min_tokens, 0, 1 << 31),
            ("presence_penalty", self.presence_penalty, -2.0, 2.0),
            ("frequency_penalty", self.frequency_penalty, -2.0, 2.0),
            ("repetition_penalty", self.repetition_penalty, 0.01, 100.0),
            ("logprobs", self.logprobs, -1, MAX_LOGPROBS),
            *(("logit_bias", bias, -100.0, 100.0) for _, bias in self.logit_bias),
            *(("a token id of logit_bias", token, 0, vocab_size - 1) for token, _ in self.logit_bias),
            *(("stop_token_ids", token, 0, vocab_size - 1) for token in self.stop_token_ids),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                return f"{name} is {value}, not in {low}..{high}"
        return None

    @property
    def greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def needs_history(self) -> bool:
        """True when logits depend on the tokens so far (penalties)."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


_TOPOLOGY = re.compile(r"^([1-9]\d{0,3})A([1-9]\d{0,3})F$", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Topology:
    """xAyF: `num_attention` attention instances and `num_ffn` FFN instances; `mono` is both in one process."""

    num_attention: int
    num_ffn: int
    mono: bool = False

    @classmethod
    def parse(cls, text: str) -> Topology:
        """Parse "2A1F" or "mono"; ConfigError otherwise."""
        if text.lower() == "mono":
            return cls(1, 0, mono=True)
        match = _TOPOLOGY.match(text)
        if match is None:
            raise ConfigError(f"topology {text!r} is not of the form xAyF (such as 2A1F) or 'mono'")
        topology = cls(int(match[1]), int(match[2]))
        if topology.num_attention > 128:
            raise ConfigError(f"topology {text!r}: at most 128 attention instances (the gang member mask's width)")
        return topology

    def __str__(self) -> str:
        return "mono" if self.mono else f"{self.num_attention}A{self.num_ffn}F"
