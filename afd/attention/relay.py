"""A stream that is alone: layers and exchanges in native calls, `AttentionRelay` over a lane of the exchange."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from afd.attention.exchange import Combined
from afd.attention.mesh_exchange import MeshExchange
from afd.kernels.relay import Outcome, Relayed
from afd.model.batch import AttentionBatch
from afd.model.relay import AttentionRelay


class RelayedLayers(NamedTuple):
    """Consecutive layers, done. combined: the last one's answer, added already; None if it is still to come.

    on_time: the next ones may be relayed, too; else the other side is slower than polling is for, or does not relay.
    """

    done: Relayed
    combined: Combined | None
    on_time: bool


class StreamRelay:
    """Main thread only."""

    def __init__(self, layers: AttentionRelay, exchange: MeshExchange):
        self._layers = layers
        self._exchange = exchange

    def run(self, stream: int, layer: int, x: Tensor, batch: AttentionBatch) -> RelayedLayers | None:
        """From `layer` on, where the stream's last exchange was that of the layer before: as far as it goes.

        x [n, hidden]: the residual, to which that exchange's answer is still to be added. None: nothing was done.
        """
        if not self._layers.takes(layer, x.shape[0]) or (lane := self._exchange.lane(stream)) is None:
            return None
        done = self._layers.run(layer, x, batch, lane)
        if not done.num_laps:
            return None
        combined = self._exchange.relayed(lane, done)
        return RelayedLayers(done, combined, done.outcome in (Outcome.DONE, Outcome.TIME_OVER))
