"""Optimizer steps on one fixed batch, each way in its own process: ours, bare transformers + AdamW, TRL's trainer.

``python -m benchmarks.learner_workers WAY SETTINGS`` prints one JSON object; `WAYS` has the ways.
Every way trains the same random model on the same trajectories, in the same dtype over fp32 masters, with the same loss
weights.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from services.learner.packing import cut

LR = 1e-5


def build(name: str) -> Any:
    """A random model: ``tiny`` is the demo's, ``smollm2`` has SmolLM2-135M's shape, ``wide`` a large vocabulary."""
    torch.manual_seed(0)
    if name == "tiny":
        config = Qwen3Config(
            vocab_size=128, hidden_size=128, intermediate_size=384, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, head_dim=32, max_position_embeddings=512, tie_word_embeddings=True,
        )  # fmt: skip
        return Qwen3ForCausalLM(config)
    smollm2 = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape = smollm2 if name == "smollm2" else wide
    heads = {"num_key_value_heads": 3 if name == "smollm2" else 4}
    vocabulary = 49_152 if name == "smollm2" else 32_768
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=32_768, tie_word_embeddings=True, **shape, **heads)
    )


def response_lengths(settings: dict[str, Any]) -> list[int]:
    """Tokens of each response, in random order: the quantiles of its distribution, so that no draw is a lucky one.

    ``response_tokens`` is {"low", "high"}: all lengths alike; or {"median", "log_sigma"}: log-normal, the long tail.
    """
    tokens, count = settings["response_tokens"], settings["batch"]
    shares = [(place + 0.5) / count for place in range(count)]
    if "median" in tokens:
        lengths = [tokens["median"] * math.exp(tokens["log_sigma"] * NormalDist().inv_cdf(share)) for share in shares]
    else:
        lengths = [tokens["low"] + share * (tokens["high"] - tokens["low"]) for share in shares]
    return [round(lengths[place]) for place in np.random.default_rng(1).permutation(count)]


def trajectories(settings: dict[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """(prompt, response) token ids."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(3, 100, settings["prompt_tokens"]), rng.integers(3, 100, length))
        for length in response_lengths(settings)
    ]


def advantages(count: int) -> np.ndarray:
    """Alternating signs, mean zero."""
    return np.where(np.arange(count) % 2, 1.0, -1.0)


def peak_bytes() -> int:
    """The most memory that this process has had at a time."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def measured(seconds: list[float]) -> dict[str, float]:
    """What a way of making steps reports: seconds of a step, and the process' peak memory, its libraries included."""
    return {"median_s": statistics.median(seconds), "peak_mib": peak_bytes() / 2**20}


def timed(step: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Time so many steps, after one to warm up."""
    step()
    seconds = []
    for _ in range(repetitions):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return measured(seconds)


def our_policy(settings: dict[str, Any], folder: str, attention: str, recompute: bool = False) -> Any:
    """The learner's policy on one rank."""
    from services.learner.policy import Policy
    from services.learner.ranks import Ranks
    from singlestream.config import LearnerConfig

    build(settings["model"]).save_pretrained(folder)
    learner = LearnerConfig(
        lr=LR, compute_dtype=settings["dtype"], micro_batch_tokens=settings["micro_batch_tokens"], attention=attention,
        gradient_checkpointing=recompute,
    )  # fmt: skip
    return Policy(Path(folder), learner, 1.0, Ranks(600))


def our_samples(rows: list[tuple[np.ndarray, np.ndarray]], rewards: np.ndarray) -> list[Any]:
    """The rows as the learner's samples."""
    from services.learner.samples import Sample

    samples = []
    for place, (prompt, response) in enumerate(rows):
        action = np.r_[np.zeros(len(prompt), bool), np.ones(len(response), bool)]
        tokens = np.r_[prompt, response].astype(np.int64)
        behaviour = np.where(action, -5.0, 0.0).astype(np.float32)
        age = np.where(action, 0, -1).astype(np.int32)
        samples.append(
            Sample(
                lease_id=f"train:00000000:{place + 1}", prompt_id="p", reward=float(rewards[place] > 0), v_hat=0.5,
                token_ids_T=tokens, action_T=action, mask_T=action, behaviour_T=behaviour, staleness_T=age,
                first_version=0, last_version=0, policy_versions=1, tool_calls=0, prompt_tokens=len(prompt),
            )
        )  # fmt: skip
    return samples


def ours(settings: dict[str, Any], attention: str) -> dict[str, float]:
    """`Policy.update`: forward, backward, statistics, clipping, optimizer."""
    rows = trajectories(settings)
    scaled = advantages(len(rows))
    samples = our_samples(rows, scaled)
    with tempfile.TemporaryDirectory() as folder:
        policy = our_policy(settings, folder, attention)
        return timed(lambda: policy.update(samples, scaled, 0), settings["repetitions"])


class Masters:
    """fp32 masters of a model that computes in another dtype, and AdamW on them, as a careful plain loop has them."""

    def __init__(self, model: torch.nn.Module, dtype: torch.dtype) -> None:
        self.masters = [parameter.detach().clone() for parameter in model.parameters()]
        self.optimizer = torch.optim.AdamW(self.masters, lr=LR, fused=True)
        self.computing = list(model.to(dtype).parameters())

    def step(self) -> None:
        """Clip, step, and copy back."""
        for master, computing in zip(self.masters, self.computing, strict=True):
            master.grad = computing.grad.float()
            computing.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            for master, computing in zip(self.masters, self.computing, strict=True):
                computing.copy_(master)


def bare(settings: dict[str, Any], packed: bool) -> dict[str, float]:
    """A plain loop over micro-batches of similar lengths: the model's logits, their log-softmax, AdamW."""
    model = build(settings["model"])
    masters = Masters(model, getattr(torch, settings["dtype"]))
    rows = trajectories(settings)
    scaled = advantages(len(rows))
    total = sum(len(response) for _, response in rows)
    budget = settings["bare_packed_tokens" if packed else "micro_batch_tokens"]
    lengths = [len(prompt) + len(response) for prompt, response in rows]
    groups = cut(lengths, budget, "packed" if packed else "padded")

    def step() -> None:
        for group in groups:
            chosen = [np.r_[rows[i]] for i in group]
            weight = [
                np.r_[np.zeros(len(rows[i][0])), np.full(len(rows[i][1]), scaled[i])].astype(np.float32) for i in group
            ]
            if packed:
                ids = torch.from_numpy(np.concatenate(chosen))[None]
                positions = torch.from_numpy(np.concatenate([np.arange(len(row)) for row in chosen]))[None]
                weights = torch.from_numpy(np.concatenate(weight))[None]
                logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
            else:
                width = max(map(len, chosen))
                ids = torch.zeros((len(chosen), width), dtype=torch.int64)
                weights = torch.zeros((len(chosen), width))
                for place, row in enumerate(chosen):
                    ids[place, : len(row)] = torch.from_numpy(row)
                    weights[place, : len(row)] = torch.from_numpy(weight[place])
                logits = model(input_ids=ids, use_cache=False).logits
            logprobs = logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            (-(logprobs * weights[:, 1:]).sum() / total).backward()
        masters.step()

    return timed(step, settings["repetitions"])


def trl_batch(settings: dict[str, Any]) -> tuple[list[dict[str, Any]], int, int]:
    """The trajectories as TRL's trainer has them behind its own generation.

    Returns its micro-batches, how many trajectories there are, and the tokens that completions are padded to.
    """
    rows = trajectories(settings)
    count, width = len(rows), max(len(response) for _, response in rows)
    completions, mask = torch.zeros((count, width), dtype=torch.int64), torch.zeros((count, width), dtype=torch.int64)
    for place, (_, response) in enumerate(rows):
        completions[place, : len(response)] = torch.from_numpy(response)
        mask[place, : len(response)] = 1
    prompts = torch.from_numpy(np.stack([prompt for prompt, _ in rows]))
    batch = {
        "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": completions,
        "completion_mask": mask, "advantages": torch.from_numpy(advantages(count)).float(),
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    micro = settings["trl_micro_batch"]
    parts = [
        {name: value if value.dim() == 0 else value[start : start + micro] for name, value in batch.items()}
        for start in range(0, count, micro)
    ]
    return parts, count, width


def trl(settings: dict[str, Any]) -> dict[str, float]:
    """TRL's GRPO trainer on the same trajectories, its generation replaced by them.

    As its documentation has it for speed: one iteration a batch and no reference model (no extra passes), no gradient
    checkpointing, autocast where the others compute in bf16, its default fused AdamW. Like its own generation step,
    completions are padded to the batch's longest.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from services.learner.tiny_model import make_tokenizer

    parts, count, width = trl_batch(settings)
    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.started)

    class Given(GRPOTrainer):
        calls = 0

        def _prepare_inputs(self, _: Any) -> Any:
            self.calls += 1
            return parts[(self.calls - 1) % len(parts)]

    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=settings["trl_micro_batch"],
            gradient_accumulation_steps=len(parts), num_generations=8,
            max_steps=settings["repetitions"] + 1, learning_rate=LR, beta=0.0, bf16=settings["dtype"] == "bfloat16",
            gradient_checkpointing=False, use_cpu=True, report_to=[], logging_steps=1000, save_strategy="no",
            max_completion_length=width, disable_tqdm=True,
        )  # fmt: skip
        dataset = Dataset.from_list([{"prompt": "1+1=?"}] * count)
        trainer = Given(
            build(settings["model"]), lambda completions, **_: [0.0] * len(completions), args=arguments,
            train_dataset=dataset, processing_class=make_tokenizer(), callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return measured(seconds[1:])


WAYS: dict[str, Callable[[dict[str, Any]], dict[str, float]]] = {
    "ours": lambda settings: ours(settings, "packed"),
    "ours-padded": lambda settings: ours(settings, "padded"),
    "bare-padded": lambda settings: bare(settings, packed=False),
    "bare-packed": lambda settings: bare(settings, packed=True),
    "trl": trl,
}

if __name__ == "__main__":
    print(json.dumps(WAYS[sys.argv[1]](json.loads(sys.argv[2]))))
