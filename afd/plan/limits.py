"""What hardware can take part at all: minimum MoE sparsity, and feasibility of weak chips (report 4.5 and 6)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from afd.plan.hardware import Chip
from afd.plan.models import ModelShape

STAGE_S = 16.6e-3
"""One of three pipeline stages of a 50 ms TPOT, summed over all layers (report section 5)."""

WIRE_BYTES_PER_ELEMENT = 3
"""fp8 row to the FFN, bf16 row back."""

FFN_BANDWIDTH_SHARE = 0.5
"""Share of an FFN chip's memory bandwidth that streams weights in the weak-hardware estimate (report section 6)."""

MAX_LINEAR_SHARE = 0.5
"""Attention is called infeasible when reading projections alone takes more of a stage than this."""


def min_sparsity(
    chip: Chip, hidden: int, num_layers: int, stage_s: float = STAGE_S, network_bytes_per_s: float | None = None
) -> float:
    """Smallest active share of experts at which a compute-bound FFN batch still fits the network (report Table 7).

    The batch that makes 8-bit experts compute bound is FL / (2 BW S) tokens; its rows, 3 H bytes a token, must cross
    the server's NICs within one stage of one layer.

    network_bytes_per_s: of one chip; None = the chip's NIC share.
    """
    network = (chip.network_bytes_per_s if network_bytes_per_s is None else network_bytes_per_s) * chip.chips_per_server
    dense_batch = chip.ridge_flop_per_byte / 2
    return WIRE_BYTES_PER_ELEMENT * hidden * dense_batch * num_layers / (network * stage_s)


def min_routed_experts(model: ModelShape, sparsity: float) -> int:
    """Routed experts per token (shared expert not counted) that `model` would need to reach `sparsity`; 0 if dense."""
    group = next((group for group in model.ffn if group.experts), None)
    if group is None:
        return 0
    shared = group.shared_intermediate / group.intermediate
    return max(1, math.ceil(sparsity * (group.experts + shared) - shared))


@dataclass(frozen=True, slots=True)
class Feasibility:
    """One chip for both roles of one model, within one pipeline stage per layer. Bytes are per chip and layer."""

    chip: str
    model: str
    min_sparsity: float
    sparsity: float
    sparse_enough: bool
    stage_bytes: float
    linear_bytes: float
    attention_feasible: bool
    kv_tokens_per_chip: int
    ffn_bytes_per_server: float
    ffn_servers: int
    ffn_chips: int


def feasibility(model: ModelShape, chip: Chip, stage_s: float = STAGE_S) -> Feasibility:
    """Report section 6: what a chip can read in a stage, and at most its memory, is what it can hold in use.

    Attention: the output projection is sliced over the server (TP), the rest replicated; what bandwidth is left reads
    8-bit KV. FFN: half of the bandwidth streams 8-bit weights, every weight once per stage.
    """
    layers = model.num_layers
    stage_bytes = chip.memory_bytes_per_s * stage_s / layers
    output = sum(g.layers * g.output_width * model.hidden for g in model.attention)
    linear_bytes = (model.linear_weights - output + output / chip.chips_per_server) / layers
    kv_per_token = sum(g.layers * g.kv_elements for g in model.attention) / layers
    attention_feasible = linear_bytes <= MAX_LINEAR_SHARE * stage_bytes
    kv_room = min(stage_bytes, chip.memory_bytes / layers) - linear_bytes
    kv_tokens = kv_room / kv_per_token if attention_feasible and kv_per_token else 0.0
    read_bytes = FFN_BANDWIDTH_SHARE * stage_bytes * layers
    server_bytes = min(read_bytes, chip.memory_bytes) * chip.chips_per_server
    servers = math.ceil(model.ffn_weights / server_bytes)
    needed = min_sparsity(chip, model.hidden, layers, stage_s)
    return Feasibility(
        chip=chip.name,
        model=model.name,
        min_sparsity=needed,
        sparsity=model.sparsity,
        sparse_enough=model.sparsity >= needed,
        stage_bytes=stage_bytes,
        linear_bytes=linear_bytes,
        attention_feasible=attention_feasible,
        kv_tokens_per_chip=int(kv_tokens),
        ffn_bytes_per_server=server_bytes,
        ffn_servers=servers,
        ffn_chips=servers * chip.chips_per_server,
    )
