"""Multi-token prediction: how many rows a step verifies, how many tokens it emits, and what drafting costs.

A step verifies 1 + n rows of a request: the last token and n drafts. They read its cache once. A draft is accepted with
the probability given for its place when all before it were, so that a step emits 1 + p1 + p1 p2 + ... tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from afd.errors import ConfigError

ACCEPTANCE = (0.82, 0.75, 0.78)
"""By place, of MiMo-V2-Flash (the same design as Step-3.5-Flash), as SGLang's documentation gives them. StepFun has
published none; long contexts lower them."""


@dataclass(frozen=True, slots=True)
class Drafts:
    """Drafts of a deployment. acceptance: of each place, given that all before it were accepted; its length is n."""

    acceptance: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if any(not 0.0 <= share <= 1.0 for share in self.acceptance):
            raise ConfigError(f"acceptance rates are shares from 0 to 1, found {self.acceptance}")

    @classmethod
    def of(cls, count: int, acceptance: tuple[float, ...] = ()) -> Drafts:
        """`count` drafts. acceptance: of the first places; the last one given stands for those behind it."""
        rates = acceptance or ACCEPTANCE
        return cls(tuple(rates[min(place, len(rates) - 1)] for place in range(count)))

    @property
    def count(self) -> int:
        return len(self.acceptance)

    @property
    def rows(self) -> int:
        """Rows of one request in a step."""
        return 1 + self.count

    @property
    def emitted(self) -> float:
        """Mean tokens of one request in a step."""
        total = share = 1.0
        for accepted in self.acceptance:
            share *= accepted
            total += share
        return total


NO_DRAFTS = Drafts()
