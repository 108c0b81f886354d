"""A stream that is alone: layers and exchanges in native calls, `AttentionRelay` over a lane of the exchange."""

from __future__ import annotations

from torch import Tensor

from afd.attention.exchange import Combined
from afd.attention.mesh_exchange import MeshExchange
from afd.kernels.relay import Relayed
from afd.model.batch import AttentionBatch
from afd.model.relay import AttentionRelay


class StreamRelay:
    """Main thread only."""

    def __init__(self, layers: AttentionRelay, exchange: MeshExchange):
        self._layers = layers
        self._exchange = exchange

    def begin(self, stream: int, step: int, x: Tensor, batch: AttentionBatch) -> Relayed | None:
        """Layer 0 of a step, computed and sent, its answer still to come; None where nothing was done.

        x [n, hidden]: the embedded rows.
        """
        num_tokens = x.shape[0]
        if not self._layers.takes(0, num_tokens) or (lane := self._exchange.begin(stream, step, num_tokens)) is None:
            return None
        done = self._layers.begin(x, batch, lane)
        if not done.num_laps:
            return None
        self._exchange.relayed(lane, done)
        return done

    def run(self, stream: int, layer: int, x: Tensor, batch: AttentionBatch) -> tuple[Relayed, Combined | None] | None:
        """From `layer` on, where the stream's last exchange was that of the layer before: as far as it goes.

        x [n, hidden]: the residual, to which that exchange's answer is still to be added. Returns what was done and the
        last layer's answer, added already, None if it is still to come; None where nothing was done.
        """
        if not self._layers.takes(layer, x.shape[0]) or (lane := self._exchange.lane(stream)) is None:
            return None
        done = self._layers.run(layer, x, batch, lane)
        if not done.num_laps:
            return None
        return done, self._exchange.relayed(lane, done)
