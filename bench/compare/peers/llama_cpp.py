"""llama.cpp with the default model's Q4_1 file as it is: 4-bit weights against bfloat16.

    python3 -m venv ENVIRONMENTS/llama_cpp
    CMAKE_BUILD_PARALLEL_LEVEL=2 ENVIRONMENTS/llama_cpp/bin/pip install llama-cpp-python numpy

It is built from source for the processor at hand. `Llama.create_completion` decodes one sequence at a time, so this
uses the C interface beneath it, as llama.cpp's own `batched-bench` does: one `llama_decode` for the prompts of all
sequences, then one for each step with a row of every sequence; each sequence has a KV stream of its own (`kv_unified`
off: no attention over other sequences' masked cells). Greedy choice is one numpy argmax over the logits of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.compare.peers.peer import Peer, Setup
from bench.drawing import Drawing

KV_GRANULE = 256  # llama.cpp rounds a sequence's KV cells up to this


class LlamaCpp(Peer):
    name = "llama_cpp"
    files = "gguf"
    draws = False  # its samplers would run here, one sequence after another, in Python

    def start(self, setup: Setup) -> str:
        import llama_cpp
        import numpy as np

        self._lib: Any = llama_cpp
        self._np: Any = np
        self._log = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: C calls it
        llama_cpp.llama_log_set(self._log, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(setup.model.encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {setup.model}")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = setup.max_sequences
        params.n_ctx = setup.max_sequences * -(-setup.max_length // KV_GRANULE) * KV_GRANULE
        params.n_batch = setup.max_sequences * setup.max_length
        params.n_threads = params.n_threads_batch = setup.threads
        params.kv_unified = False
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {setup.max_sequences} x {setup.max_length} tokens")
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)
        return llama_cpp.__version__

    def run_round(self, prompts: Sequence[Sequence[int]], output_len: int, drawing: Drawing) -> list[list[int]]:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), False)
        out: list[list[int]] = [[] for _ in prompts]
        rows = [list(prompt) for prompt in prompts]
        begin = 0
        for _ in range(output_len):
            tokens = self._decode(rows, begin)
            begin += len(rows[0])
            for ids, token in zip(out, tokens, strict=True):
                ids.append(token)
            rows = [[token] for token in tokens]
        return out

    def _decode(self, rows: list[list[int]], begin: int) -> list[int]:
        """Runs rows[i], equally many for all, as positions begin.. of sequence i; returns the next token of each."""
        batch, slot = self._batch, 0
        for seq, tokens in enumerate(rows):
            for idx, token in enumerate(tokens):
                batch.token[slot], batch.pos[slot] = token, begin + idx
                batch.n_seq_id[slot], batch.seq_id[slot][0] = 1, seq
                batch.logits[slot] = idx == len(tokens) - 1
                slot += 1
        batch.n_tokens = slot
        code = self._lib.llama_decode(self._context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        logits = self._np.ctypeslib.as_array(self._lib.llama_get_logits(self._context), (len(rows), self._vocab_size))
        return logits.argmax(axis=1).tolist()

    def close(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._context)
        self._lib.llama_model_free(self._model)
        self._lib.llama_backend_free()
