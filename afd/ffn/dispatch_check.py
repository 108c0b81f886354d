"""What a dispatch may name, for an FFN worker that believes no peer. Pure.

stepmesh checks a frame against its pair; which layers and experts exist, only the engine knows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from afd.model.spec import ModelSpec


class DispatchCheck:
    """The layers of one model, and the experts of each."""

    def __init__(self, spec: ModelSpec):
        self._layers = [(layer.ffn.top_k, layer.ffn.num_experts) for layer in spec.layers]

    def fault(self, layer: int, top_k: int, expert_ids: npt.NDArray[np.int32] | None) -> str | None:
        """Why no honest attention worker of this model sends this, in one line; None when it may.

        expert_ids: [num_tokens, top_k], None when top_k is 0.
        """
        if layer >= len(self._layers):
            return f"layer {layer}, the model has {len(self._layers)}"
        wanted, num_experts = self._layers[layer]
        if top_k != wanted:
            return f"{top_k} experts for each row of layer {layer}, which takes {wanted}"
        if expert_ids is not None and expert_ids.size:
            lowest, highest = int(expert_ids.min()), int(expert_ids.max())
            if lowest < 0 or highest >= num_experts:
                return f"expert {lowest if lowest < 0 else highest} of layer {layer}, which has {num_experts}"
        return None
