"""The line through many steps, for those who look further than the next one: plan and autoscaler. Pure.

Least squares, in which a step counts half as much after HALF_LIFE others. A worker's own predictions follow its newest
steps closely (`afd.sched.curves`), and a few noisy steps say little of how time divides into a base and slopes.
"""

from __future__ import annotations

from collections.abc import Sequence

HALF_LIFE = 400  # steps
KEPT = 0.5 ** (1.0 / HALF_LIFE)
PRIOR = 3e-3  # weight of what is thought of the constant part, in the steps' weight
FLAT = 1e-6  # share of a feature's square that must vary by itself, or it says nothing


class Trend:
    """seconds = sum of coefficient * feature; none is negative. The first feature is the constant 1.

    Where steps of one size only were seen, half of them is thought to be constant.
    """

    def __init__(self, num_features: int):
        self._squares = [[0.0] * num_features for _ in range(num_features)]
        self._products = [0.0] * num_features

    def add(self, seconds: float, features: Sequence[float], expected_s: float) -> None:
        """One measured step; it is as uncertain as it was expected to be long."""
        weight = 1.0 / expected_s**2
        for i, feature in enumerate(features):
            row = self._squares[i]
            for j, other in enumerate(features):
                row[j] = KEPT * row[j] + weight * feature * other
            self._products[i] = KEPT * self._products[i] + weight * feature * seconds

    @property
    def coefficients(self) -> tuple[float, ...]:
        """The coefficients of the best line; what does not vary, or would be negative, is 0."""
        used = list(range(len(self._products)))
        while used:
            values = self._solved(used)
            if values is None:
                used.pop()
                continue
            worst = min(range(len(used)), key=values.__getitem__)
            if values[worst] >= 0.0:
                break
            del used[worst]
        else:
            return (0.0,) * len(self._products)
        found = dict(zip(used, values, strict=True))
        return tuple(found.get(i, 0.0) for i in range(len(self._products)))

    def scaled(self, factor: float) -> Trend:
        """The same of work that takes `factor` times as long."""
        other = Trend(len(self._products))
        other._squares = [row[:] for row in self._squares]
        other._products = [factor * product for product in self._products]
        return other

    def _solved(self, used: list[int]) -> list[float] | None:
        """The normal equations of these features by elimination; None where one of them is none of its own."""
        rows = [[self._squares[i][j] for j in used] + [self._products[i]] for i in used]
        if used[0] == 0:  # as if a few steps had shown the constant part alone
            rows[0][0] *= 1.0 + PRIOR
            rows[0][-1] *= 1.0 + PRIOR / 2.0
        size = len(used)
        for k in range(size):
            if rows[k][k] <= FLAT * self._squares[used[k]][used[k]]:
                return None
            for i in range(k + 1, size):
                factor = rows[i][k] / rows[k][k]
                for j in range(k, size + 1):
                    rows[i][j] -= factor * rows[k][j]
        values = [0.0] * size
        for k in reversed(range(size)):
            rest = sum(rows[k][j] * values[j] for j in range(k + 1, size))
            values[k] = (rows[k][size] - rest) / rows[k][k]
        return values
