"""One micro-batch as the attention kernels see it: positions, cache slots, sequence boundaries, block tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from afd.ops.device import to_device
from afd.ops.ops import AttentionArgs, LayerBatch, LayerTables, Rotary

_CPU = torch.device("cpu")

NewTokens = tuple[int, int, Sequence[int]]
"""One sequence of a batch: (start_pos, num_new, block_ids). The blocks cover start_pos + num_new tokens."""


@dataclass(slots=True)
class AttentionBatch:
    """Tokens of several sequences back to back; decodes (one token) and prefill chunks mix freely.

    windowed: the same tokens with the blocks of sliding-window layers; None = all layers share blocks.
    positions [n] int64; slot_mapping [n] int64 = block * block_size + offset; query_start [s + 1] int32 offsets into
    the n tokens; seq_lens [s] int32 contexts including this step's tokens; block_table [s, max_blocks] int32.
    host_query_start, host_seq_lens: the same in host memory, for loops over sequences that must not wait for a GPU.
    """

    positions: Tensor
    slot_mapping: Tensor
    query_start: Tensor
    seq_lens: Tensor
    block_table: Tensor
    max_query_len: int
    max_seq_len: int
    host_query_start: npt.NDArray[np.int32]
    host_seq_lens: npt.NDArray[np.int32]
    windowed: AttentionBatch | None = None
    _rope: dict[Rotary, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False)
    _for_calls: dict[Rotary, LayerBatch] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        seqs: Sequence[NewTokens],
        block_size: int,
        device: torch.device = _CPU,
        window_blocks: Sequence[Sequence[int]] | None = None,
    ) -> AttentionBatch:
        """Make a batch of (start_pos, num_new, block_ids) of each sequence, in the order of the tokens in the batch.

        window_blocks: each sequence's blocks in sliding-window layers, where those have blocks of their own.
        """
        starts = np.array([start for start, _, _ in seqs], np.int64)
        counts = np.array([count for _, count, _ in seqs], np.int64)
        lengths = starts + counts
        seq_lens = lengths.astype(np.int32)
        num_blocks = -(-lengths // block_size)
        table = _block_table([blocks for _, _, blocks in seqs], num_blocks)
        query_start = np.zeros(len(seqs) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        rows = np.repeat(np.arange(len(seqs)), counts)
        positions = np.arange(len(rows)) - query_start[rows] + starts[rows]
        batch = cls(
            positions=to_device(torch.from_numpy(positions), device),
            slot_mapping=to_device(_slots(table, rows, positions, block_size), device),
            query_start=to_device(torch.from_numpy(query_start), device),
            seq_lens=to_device(torch.from_numpy(seq_lens), device),
            block_table=to_device(torch.from_numpy(table), device),
            max_query_len=int(counts.max(initial=0)),
            max_seq_len=int(lengths.max(initial=0)),
            host_query_start=query_start,
            host_seq_lens=seq_lens,
        )
        if window_blocks is not None:
            table = _block_table(window_blocks, num_blocks)
            batch.windowed = replace(
                batch,
                slot_mapping=to_device(_slots(table, rows, positions, block_size), device),
                block_table=to_device(torch.from_numpy(table), device),
                _for_calls={},
            )
        return batch

    def with_room(self, num_seqs: int, columns: int) -> AttentionBatch:
        """A batch of decodes on a GPU with memory of its own, for as many sequences and blocks as this has, or more.

        `assign` fills it, but for the host's copies of lengths: those stay, and no decode reads them.
        """
        missing = num_seqs - self.num_seqs

        def more_rows(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])

        def own_blocks(batch: AttentionBatch, windowed: AttentionBatch | None) -> AttentionBatch:
            table = F.pad(more_rows(batch.block_table), (0, columns - batch.block_table.shape[1]))
            return replace(
                roomy,
                slot_mapping=more_rows(batch.slot_mapping),
                block_table=table,
                windowed=windowed,
                _for_calls={},
            )

        roomy = replace(
            self,
            positions=more_rows(self.positions),
            query_start=torch.arange(num_seqs + 1, dtype=torch.int32, device=self.positions.device),
            seq_lens=more_rows(self.seq_lens),
            _rope={},
        )
        return own_blocks(self, None if self.windowed is None else own_blocks(self.windowed, None))

    def assign(self, batch: AttentionBatch, spare_slots: tuple[int, int]) -> None:
        """Become `batch`, in the same memory, its angles included. Sequences beyond it write to the spare slots: those
        of layers without and with blocks of their own for a window.
        """
        num_seqs, columns = batch.block_table.shape
        self.positions[:num_seqs].copy_(batch.positions)
        self.seq_lens[:num_seqs].copy_(batch.seq_lens)
        for mine, other, spare in zip((self, self.windowed), (batch, batch.windowed), spare_slots, strict=True):
            if mine is not None and other is not None:
                mine.slot_mapping[:num_seqs].copy_(other.slot_mapping)
                mine.slot_mapping[num_seqs:].fill_(spare)
                mine.block_table[:num_seqs, :columns].copy_(other.block_table)
        for rope, angles in self._rope.items():
            for table, new in zip(angles, rope.of(self.positions, batch.max_seq_len), strict=True):
                table.copy_(new)

    def of_layer(self, window: int) -> AttentionBatch:
        """The batch with the blocks that a layer of this window (0 = none) has."""
        return self.windowed if window and self.windowed is not None else self

    @property
    def num_tokens(self) -> int:
        return self.positions.shape[0]

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    def rope_tables(self, rope: Rotary) -> tuple[Tensor, Tensor]:
        """(cos, sin) of this batch's positions, looked up once for all layers that share `rope`."""
        if rope not in self._rope:
            self._rope[rope] = rope.of(self.positions, self.max_seq_len)
        return self._rope[rope]

    def for_call(self, rope: Rotary, make: Callable[[LayerTables], LayerBatch]) -> LayerBatch:
        """What `make` (`LayerCall.batch`) makes of this batch, once for all layers that share `rope` and blocks."""
        if rope not in self._for_calls:
            tables = (self.slot_mapping, self.block_table, self.seq_lens, self.query_start)
            self._for_calls[rope] = make(LayerTables(*self.rope_tables(rope), *tables))
        return self._for_calls[rope]

    def attention(self, q: Tensor, k_cache: Tensor, v_cache: Tensor, scale: float, window: int) -> AttentionArgs:
        """The attention of this batch's queries q [n, num_heads, head_dim] over one layer's cache."""
        return AttentionArgs(
            q,
            k_cache,
            v_cache,
            self.block_table,
            self.seq_lens,
            self.query_start,
            scale,
            window,
            self.host_seq_lens,
            self.host_query_start,
        )


def _block_table(
    blocks_of: Sequence[Sequence[int]], num_blocks: np.ndarray[tuple[int, ...], np.dtype[np.int64]]
) -> np.ndarray[tuple[int, ...], np.dtype[np.int32]]:
    """[num_seqs, max_blocks]; what no token sees (padding, dropped blocks) is 0, a block that exists."""
    table = np.zeros((len(blocks_of), int(num_blocks.max(initial=0))), np.int32)
    needed = num_blocks.tolist()
    for row, blocks in enumerate(blocks_of):
        assert len(blocks) >= needed[row], f"sequence {row} has {len(blocks)} blocks and needs {needed[row]}"
    table[np.arange(table.shape[1]) < num_blocks[:, None]] = [
        block for blocks, count in zip(blocks_of, needed, strict=True) for block in blocks[:count]
    ]
    return np.maximum(table, 0, out=table)


def _slots(
    table: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
    rows: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    positions: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    block_size: int,
) -> Tensor:
    """[n] int64: where each token's K and V go."""
    blocks = table[rows, positions // block_size].astype(np.int64)
    return torch.from_numpy(blocks * block_size + positions % block_size)
