"""The pipeline's closed form, for all who predict: planner, simulator, coordinator, attention worker, trace. Pure.

Streams are jobs that circulate through devices, each of which does one thing at a time: the attention worker, the FFN
worker, and each direction of the link between them (full duplex). In the steady state of such a closed pipeline

    cycle = max(the busiest device's seconds for one step of every stream, the longest way of one stream by itself)

For m equal streams that is, per micro-batch and layer, max(A, out, F, back, (A + out + F + back) / m).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def cycle_s(devices_s: Iterable[float], ways_s: Iterable[float]) -> float:
    """Seconds in which every stream makes one step.

    devices_s: seconds that each device works for one step of every stream.
    ways_s: seconds that a step of each stream takes without waiting for anybody.
    """
    return max(*devices_s, *ways_s)


def equal_streams_cycle_s(
    num_streams: int, layer_s: Sequence[float], way_s: float, num_layers: int = 1, head_s: float = 0.0
) -> float:
    """Seconds in which `num_streams` equal streams make one step each.

    A head is computed by the attention worker, and fills what would be waiting of it, one after the other
    (`afd.sched.head_slices`). With k streams in the layers, min(1 / busiest device, k / way) layers are computed a
    second; for one that is at its head, the others leave what they do not need of the attention worker.

    layer_s: seconds of one layer of one stream on each device, the attention worker's first; above 0.
    way_s: seconds of one layer of one stream without waiting: the devices' sum, and latency that keeps nothing busy.
    head_s: head and sampling of one step of one stream.
    """
    m, attention_s = num_streams, layer_s[0]
    plain_s = cycle_s(
        [m * (num_layers * attention_s + head_s), *(m * num_layers * device_s for device_s in layer_s[1:])],
        [num_layers * way_s + head_s],
    )
    rate, others = (min(1.0 / max(layer_s), k / way_s) for k in (m, m - 1))
    left = 1.0 - others * attention_s
    heads_s = m * head_s / left if left > 0.0 else math.inf
    if others * heads_s >= m * num_layers:  # there is always one at its head: the attention worker never waits
        return plain_s
    return max(plain_s, heads_s + (m * num_layers - others * heads_s) / rate)
