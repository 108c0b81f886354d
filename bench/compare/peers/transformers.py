"""Hugging Face transformers' `generate`: one padded batch, dynamic KV cache, SDPA.

    python3 -m venv ENVIRONMENTS/transformers
    ENVIRONMENTS/transformers/bin/pip install torch transformers

or, since it is what this project's tests use as their oracle: ln -s $PWD/.venv ENVIRONMENTS/transformers
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.compare.peers.peer import Peer, Setup
from bench.drawing import Drawing


class Transformers(Peer):
    name = "transformers"
    files = "huggingface"
    environment = {"HF_HUB_OFFLINE": "1"}  # noqa: RUF012

    def start(self, setup: Setup) -> str:
        import torch
        import transformers

        torch.set_num_threads(setup.threads)
        self._torch = torch
        model = transformers.AutoModelForCausalLM.from_pretrained(setup.model, dtype=getattr(torch, setup.dtype))
        self._model = model.eval()
        return transformers.__version__

    def run_round(self, prompts: Sequence[Sequence[int]], output_len: int, drawing: Drawing) -> list[list[int]]:
        """The prompts must be of one length: nothing is padded."""
        ids = self._torch.tensor([list(prompt) for prompt in prompts])
        how = {} if drawing.greedy else {"temperature": drawing.temperature, "top_p": drawing.top_p, "top_k": 0}
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=output_len,
                do_sample=not drawing.greedy,
                **how,
                eos_token_id=None,  # runs to max_new_tokens
            )
        return out[:, ids.shape[1] :].tolist()

    def close(self) -> None:
        del self._model
