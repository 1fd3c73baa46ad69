"""Run in tests: a real engine on a model folder prints its log-probs of some tokens, as JSON."""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main(folder: str, tokens: list[int]) -> None:
    from vllm import LLM, SamplingParams

    engine = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=2, block_size=32)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    (reply,) = engine.generate([{"prompt_token_ids": tokens}], sampling, use_tqdm=False)
    scores = [place[token].logprob for place, token in zip(reply.prompt_logprobs[1:], tokens[1:], strict=True)]
    print("logprobs " + json.dumps(scores))


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
