"""Runs inside vLLM's own virtual environment: one JSON request a line on stdin, one JSON answer a line on stdout.

{"prompts": [[ids], ...], "max_tokens": n} -> {"seconds": s, "ids": [[...], ...]}
"""

import json
import os
import sys
import time


def main() -> None:
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # vLLM logs to stdout: only answers may go there
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=sys.argv[1],
        dtype=sys.argv[2],
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=2048,
        max_num_seqs=256,
        disable_log_stats=True,
    )
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        request = json.loads(line)
        params = SamplingParams(temperature=0, max_tokens=request["max_tokens"], ignore_eos=True, detokenize=False)
        prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
        begun = time.perf_counter()
        answers = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - begun
        print(json.dumps({"seconds": seconds, "ids": [list(a.outputs[0].token_ids) for a in answers]}), file=out)


if __name__ == "__main__":  # vLLM starts its engine process by spawning: it imports this file again
    main()
