"""What each choice of precision does to a model's output: relative L2 of its logits, and agreement of its next tokens.

    python bench/quantisation.py                # the default model, some hundred positions of text
    python bench/quantisation.py --model <folder> --positions 200

Every variant is compared with float32 throughout, at the same positions of the same texts (teacher-forced: a wrong
token does not lead to others). KL is the mean Kullback-Leibler divergence of the next-token distributions. "perplexity"
is that of the texts themselves. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from afd.kv.cache import KVCache
from afd.model.batch import AttentionBatch
from afd.model.halves import AttentionHalf, FFNHalf
from afd.model.inventory import TensorSpec
from afd.model.loading import DEFAULT_MODEL, ModelFolder, load_attention_half, load_ffn_half, resolve_model
from afd.model.sharding import ShardSpec
from afd.model.tokenizer_files import load_tokenizer
from afd.model.weights.checkpoint import Checkpoint, as_float32
from afd.model.weights.source import RawTensor, Slices
from afd.model.wire_format import decode_rows, encode_rows
from afd.ops.select import select
from stepmesh.types import WireDtype

TEXTS = (
    "The Pacific Ocean is the largest and deepest of Earth's five oceanic divisions. It extends from the Arctic Ocean "
    "in the north to the Southern Ocean in the south, and is bounded by the continents of Asia and Australia in the "
    "west and the Americas in the east.",
    "def quicksort(items):\n    if len(items) <= 1:\n        return items\n    pivot = items[0]\n    left = "
    "[x for x in items[1:] if x < pivot]\n    right = [x for x in items[1:] if x >= pivot]\n    return "
    "quicksort(left) + [pivot] + quicksort(right)\n",
    "To make a simple bread, mix flour, water, salt and yeast in a large bowl. Knead the dough for ten minutes until "
    "it is smooth and elastic, then cover it and let it rise in a warm place until it has doubled in size.",
    "The theory of evolution by natural selection was proposed by Charles Darwin in 1859. It explains how populations "
    "of organisms change over generations through the differential survival and reproduction of individuals.",
)
FP8_BLOCK = 128


@dataclass(frozen=True)
class Variant:
    """name: as in the table.  weights: `model.weights`.  wire: of the rows to the FFN, None = as they are."""

    name: str
    dtype: str = "float32"
    weights: str = "auto"
    wire: WireDtype | None = None
    fp8_checkpoint: bool = False


VARIANTS = (
    Variant("float32", "float32"),
    Variant("wire bf16", wire=WireDtype.BF16),
    Variant("wire fp8", wire=WireDtype.FP8_E4M3),
    Variant("weights int8 (FFN)", weights="int8"),
    Variant("weights int8-all (FFN, attention, head)", weights="int8-all"),
    Variant("block-fp8 checkpoint", fp8_checkpoint=True),
    Variant("bfloat16 (compute, KV cache, wire)", "bfloat16"),
    Variant("bfloat16, wire fp8", "bfloat16", wire=WireDtype.FP8_E4M3),
    Variant("bfloat16, weights int8", "bfloat16", weights="int8"),
    Variant("bfloat16, weights int8-all", "bfloat16", weights="int8-all"),
    Variant("bfloat16, wire fp8, weights int8", "bfloat16", "int8", WireDtype.FP8_E4M3),
    Variant("bfloat16, wire fp8, weights int8-all", "bfloat16", "int8-all", WireDtype.FP8_E4M3),
)


class Fp8Checkpoint(Checkpoint):
    """A checkpoint as if every matrix but embedding, head and routers had been stored in block-scaled float8."""

    def read(self, tensor: TensorSpec, slices: Slices = ()) -> RawTensor:
        if len(tensor.shape) < 2 or tensor.part in ("embed", "head", "router"):
            return super().read(tensor, slices)
        whole = torch.from_numpy(as_float32(super().read(tensor)).copy())
        return RawTensor(_block_fp8(whole)[slices].contiguous().numpy())


def _block_fp8(matrix: Tensor) -> Tensor:
    """Rounded to e4m3 with a scale for each block, and back."""
    rows, columns = matrix.shape[-2:]
    padded = F.pad(matrix, (0, -columns % FP8_BLOCK, 0, -rows % FP8_BLOCK))
    blocks = padded.unflatten(-1, (-1, FP8_BLOCK)).unflatten(-3, (-1, FP8_BLOCK))
    scales = blocks.abs().amax(dim=(-3, -1), keepdim=True).clamp(min=1e-30) / 448
    rounded = (blocks / scales).to(torch.float8_e4m3fn).float() * scales
    return rounded.flatten(-4, -3).flatten(-2)[..., :rows, :columns]


def logits_of(attention: AttentionHalf, ffn: FFNHalf, ids: Tensor, wire: WireDtype | None) -> Tensor:
    """[n, vocab] float32 of one text, with the rows of every layer taken through the wire's type."""
    num_blocks = -(-len(ids) // 16)
    cache = KVCache(attention.spec, num_blocks, 16, attention.dtype)
    batch = AttentionBatch.build([(0, len(ids), range(num_blocks))], 16)
    x = attention.embed(ids)
    for layer in range(attention.spec.num_layers):
        dispatch = attention.layer(layer, x, batch, cache)
        if wire is not None:
            rows = decode_rows(*encode_rows(dispatch.rows, wire), ffn.dtype)
            dispatch = replace(dispatch, rows=rows)
        attention.combine(x, [ffn.layer(dispatch)])
    return attention.logits(x)


def run(folder: ModelFolder, variant: Variant, texts: list[Tensor]) -> Tensor:
    """Logits of all positions of all texts."""
    if variant.fp8_checkpoint:
        old = folder.checkpoint
        folder = replace(folder, checkpoint=Fp8Checkpoint(old.spec, old.source, old.naming, old.where))
    attention = load_attention_half(folder, select("cpu", variant.dtype), weights=variant.weights)
    ffn = load_ffn_half(folder, ShardSpec(), select("cpu", variant.dtype), weights=variant.weights)
    return torch.cat([logits_of(attention, ffn, ids, variant.wire) for ids in texts])


def measures(got: Tensor, want: Tensor, next_ids: Tensor) -> dict[str, float]:
    """Differences of one variant from float32; next_ids: the texts' own next token of each position, -1 at the ends."""
    log_got, log_want = F.log_softmax(got, 1), F.log_softmax(want, 1)
    inside = next_ids >= 0
    losses = F.nll_loss(log_got[inside], next_ids[inside])
    return {
        "relative_l2": float((got - want).norm() / want.norm()),
        "kl": float(F.kl_div(log_got, log_want, reduction="batchmean", log_target=True)),
        "greedy_agreement": float((got.argmax(1) == want.argmax(1)).float().mean()),
        "perplexity": float(losses.exp()),
    }


def token_ids(folder: ModelFolder, positions: int) -> list[Tensor]:
    """The texts' tokens; random ones for a model without a tokenizer."""
    if folder.tokenizer_path is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(folder.spec.vocab_size, (positions,), generator=generator)]
    tokenizer = load_tokenizer(folder).tokenizer
    texts = [torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids) for text in TEXTS]
    return [ids[: max(2, positions // len(texts))] for ids in texts]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--positions", type=int, default=400, help="upper bound over all texts")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = resolve_model(args.model)
    texts = token_ids(folder, args.positions)
    next_ids = torch.cat([torch.cat((ids[1:], torch.tensor([-1]))) for ids in texts])
    reference = run(folder, VARIANTS[0], texts)
    print(f"{folder.name}: {len(next_ids)} positions of {len(texts)} texts\n")
    print("| choice | relative L2 of logits | KL | greedy agreement | perplexity |\n|---|---|---|---|---|")
    results: dict[str, dict[str, float]] = {}
    for variant in VARIANTS:
        got = reference if variant is VARIANTS[0] else run(folder, variant, texts)
        result = results[variant.name] = measures(got, reference, next_ids)
        print(
            f"| {variant.name} | {result['relative_l2']:.2e} | {result['kl']:.1e} | "
            f"{result['greedy_agreement']:.1%} | {result['perplexity']:.2f} |",
            flush=True,
        )
    print(json.dumps({"bench": "quantisation", "model": folder.name, "positions": len(next_ids), "results": results}))


if __name__ == "__main__":
    main()
