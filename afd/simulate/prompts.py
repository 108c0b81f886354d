"""Token ids of simulated prompts. Nothing depends on them but the prefix cache: equal prefixes have equal ids."""

from __future__ import annotations

from afd.simulate.arrivals import Request

WORD_TOKEN = 0
PRIVATE = 1 << 63  # names from there on are made here, one for each request
NAME_BITS = 64


class Prompts:
    """Spells prompts. Each named block begins with its name, in digits of the vocabulary's size.

    vocab: token ids that the model has.
    block_tokens: tokens that a name stands for; 0 = prompts share nothing and are all spelt alike, for workers without
        a prefix cache.
    """

    def __init__(self, vocab: int, block_tokens: int):
        self._vocab = vocab
        self._block_tokens = block_tokens
        self._num_digits = 1
        while vocab**self._num_digits < 1 << NAME_BITS:
            self._num_digits += 1

    def ids(self, request: Request) -> list[int]:
        """The prompt: its named blocks, then tokens that no other request has."""
        size = self._block_tokens
        if not size:
            return [WORD_TOKEN] * request.num_prompt
        ids: list[int] = []
        for name in request.hash_ids:
            ids += self._named(name, size)
        rest = request.num_prompt - len(ids)
        if rest > 0:
            ids += self._named(PRIVATE + request.idx, rest)
        return ids[: request.num_prompt]

    def _named(self, name: int, size: int) -> list[int]:
        """A block of `size` tokens that is like no other of another name."""
        digits = []
        for _ in range(self._num_digits):
            name, digit = divmod(name, self._vocab)
            digits.append(digit)
        return [*digits, *[WORD_TOKEN] * (size - len(digits))] if size > len(digits) else digits[:size]
