"""How to split GPUs between rollouts and the learner: what ``singlestream plan`` says.

A pure calculation from model size, GPUs and lengths. It rests on throughputs that were **estimated** for an 8B model on
H100s and are scaled to other sizes; each assumption is a constant below and is told with the answer. Measure, then give
the measured throughputs instead (``rollout_tokens_per_s``, ``learner_tokens_per_s``).
"""

from __future__ import annotations

from dataclasses import dataclass

from singlestream.errors import ConfigError

REFERENCE_PARAMETERS = 8.2e9
"""The model that the throughputs below are for: Qwen3-8B."""
REFERENCE_MEMORY_GIB = 80.0
"""Memory of the GPU they are for."""
ROLLOUT_TOKENS_PER_S = 3250.0
"""Sampled tokens a second of one GPU: the middle of the estimate 3,000 to 3,500."""
LEARNER_TOKENS_PER_S = 6500.0
"""Tokens a second of one GPU, forward, backward and step: the middle of the estimate 6,000 to 7,000."""
ROLLOUT_CEILING_TOKENS_PER_S = 20_000.0
"""A small model's engine is bound by its scheduler, not by arithmetic: what one GPU is taken to sample at most."""
STATE_BYTES_PER_PARAMETER = 16.0
"""fp32 master, gradient and two moments: 131 GB for 8.2 billion parameters."""
ACTIVATION_BYTES_PER_TOKEN = 1.34e6
"""With activation checkpointing at the reference size: 22 GB for 16,384 tokens. Scales with parameters^(2/3)."""
USABLE_SHARE = 0.9
"""Of a GPU's memory."""
WEIGHT_SHARE = 0.6
"""Weights take at most this share of an engine's usable memory; the rest is KV cache."""
OTHER_TOKENS_SHARE = 0.1
"""Of the tokens that the learner computes: prompts and tool output, which no engine sampled."""
GIB = 2**30


@dataclass(frozen=True)
class Split:
    """One way to divide the GPUs, and what each side would do.

    Args:
        rollout_gpus: GPUs of all engines together.
        learner_gpus: ranks of the learner.
        tensor_parallel: GPUs of one engine.
        tokens_per_s: sampled tokens a second of the whole: the slower side's.
        rollout_idle: share of the engines' capacity that waits for admission, in [0, 1).
        learner_idle: share of the learner's time that waits for trajectories, in [0, 1).
        learner_memory_gib: memory of one rank.
    """

    rollout_gpus: int
    learner_gpus: int
    tensor_parallel: int
    tokens_per_s: float
    rollout_idle: float
    learner_idle: float
    learner_memory_gib: float

    @property
    def replicas(self) -> int:
        """Engines."""
        return self.rollout_gpus // self.tensor_parallel


@dataclass(frozen=True)
class Plan:
    """The proposal and the other splits that fit.

    Args:
        best: the split of the highest throughput; among equals the one with more rollouts, which serve evaluation too.
        others: the other splits that fit, best first.
        step_s: seconds between optimizer steps.
        weights_gib: bf16 weights that each version publishes.
        weights_volume_gib: what the weights' volume must hold: two versions kept, one being written, and where machines
            fetch them one more.
        network_s: seconds that one version takes to another machine; None where no network was named.
        assumptions: what the figures rest on, one sentence each.
    """

    best: Split
    others: tuple[Split, ...]
    step_s: float
    weights_gib: float
    weights_volume_gib: float
    network_s: float | None
    assumptions: tuple[str, ...]


def tensor_parallel_for(parameters: float, gpu_memory_gib: float) -> int:
    """Smallest power of two of GPUs whose memory holds an engine's bf16 weights with room for its KV cache."""
    size = 1
    while 2 * parameters / size > WEIGHT_SHARE * USABLE_SHARE * gpu_memory_gib * GIB:
        size *= 2
    return size


def learner_memory_gib(parameters: float, ranks: int, micro_batch_tokens: int) -> float:
    """Memory of one FSDP rank: its shard of the state, and the activations of one micro-batch."""
    activations = ACTIVATION_BYTES_PER_TOKEN * (parameters / REFERENCE_PARAMETERS) ** (2 / 3) * micro_batch_tokens
    return float((STATE_BYTES_PER_PARAMETER * parameters / ranks + activations) / GIB)


def plan(
    parameters: float,
    gpus: int,
    mean_response_tokens: float,
    train_batch_size: int = 256,
    micro_batch_tokens: int = 16_384,
    gpu_memory_gib: float = REFERENCE_MEMORY_GIB,
    rollout_tokens_per_s: float | None = None,
    learner_tokens_per_s: float | None = None,
    network_gbit_per_s: float | None = None,
) -> Plan:
    """Split GPUs so that neither side waits longer than it must.

    Args:
        parameters: of the model, for example 8.2e9.
        gpus: GPUs in all, at least 2.
        mean_response_tokens: sampled tokens of a trajectory, on average.
        train_batch_size: trajectories of one optimizer step.
        micro_batch_tokens: ``learner.micro_batch_tokens``, at least the longest trajectory.
        gpu_memory_gib: memory of one GPU.
        rollout_tokens_per_s: measured sampled tokens a second of one GPU; None takes the estimate.
        learner_tokens_per_s: measured tokens a second of one GPU of the learner; None takes the estimate.
        network_gbit_per_s: network between machines; None where there is one machine.

    Raises:
        ConfigError: an argument is out of range, or no split fits the memory.
    """
    if gpus < 2:
        raise ConfigError(
            "a plan splits GPUs, so it needs at least 2; one GPU is shared (configs/qwen3-0.6b-one-gpu.toml)"
        )
    numbers = (parameters, mean_response_tokens, train_batch_size, micro_batch_tokens, gpu_memory_gib)
    if not all(number > 0 for number in numbers):
        raise ConfigError("parameters, tokens, batch size and memory must be positive")
    scale = REFERENCE_PARAMETERS / parameters
    rollout_rate = rollout_tokens_per_s or min(ROLLOUT_CEILING_TOKENS_PER_S, ROLLOUT_TOKENS_PER_S * scale)
    learner_rate = learner_tokens_per_s or LEARNER_TOKENS_PER_S * scale
    splits = _splits(parameters, gpus, micro_batch_tokens, gpu_memory_gib, rollout_rate, learner_rate)
    weights_gib = 2 * parameters / GIB
    return Plan(
        best=splits[0],
        others=tuple(splits[1:]),
        step_s=train_batch_size * mean_response_tokens / splits[0].tokens_per_s,
        weights_gib=weights_gib,
        weights_volume_gib=(3 if network_gbit_per_s is None else 4) * weights_gib,
        network_s=None if network_gbit_per_s is None else 16 * parameters / (network_gbit_per_s * 1e9),
        assumptions=_assumptions(
            None if rollout_tokens_per_s else rollout_rate,
            None if learner_tokens_per_s else learner_rate,
            gpu_memory_gib,
        ),
    )


def _splits(
    parameters: float,
    gpus: int,
    micro_batch_tokens: int,
    gpu_memory_gib: float,
    rollout_rate: float,
    learner_rate: float,
) -> list[Split]:
    """Every split that fits the memory, best first; rates are tokens a second of one GPU. Raises `ConfigError`."""
    size = tensor_parallel_for(parameters, gpu_memory_gib)
    found = []
    for learner_gpus in range(1, gpus):
        rollout_gpus = (gpus - learner_gpus) // size * size
        memory_gib = learner_memory_gib(parameters, learner_gpus, micro_batch_tokens)
        if rollout_gpus == 0 or memory_gib > USABLE_SHARE * gpu_memory_gib:
            continue
        sampled = rollout_gpus * rollout_rate
        trained = learner_gpus * learner_rate * (1 - OTHER_TOKENS_SHARE)
        rate = min(sampled, trained)
        found.append(Split(rollout_gpus, learner_gpus, size, rate, 1 - rate / sampled, 1 - rate / trained, memory_gib))
    if not found:
        raise ConfigError(
            f"no split of {gpus} GPUs of {gpu_memory_gib:.0f} GiB fits: an engine needs {size}, and the learner's "
            f"state is {STATE_BYTES_PER_PARAMETER * parameters / GIB:.0f} GiB over its ranks, besides "
            f"{learner_memory_gib(parameters, 10**9, micro_batch_tokens):.0f} GiB of activations on each"
        )
    return sorted(found, key=lambda split: (-split.tokens_per_s, -split.rollout_gpus))


def _assumptions(rollout_estimate: float | None, learner_estimate: float | None, memory_gib: float) -> tuple[str, ...]:
    told = []
    source = "(estimated for 8B on H100s, scaled by size)"
    if rollout_estimate is not None:
        told.append(f"an engine samples {rollout_estimate:.0f} tokens/s a GPU {source}")
    if learner_estimate is not None:
        told.append(f"the learner trains {learner_estimate:.0f} tokens/s a GPU {source}")
    if told and memory_gib != REFERENCE_MEMORY_GIB:
        told.append("GPUs of another memory are taken to be as fast as an H100: measure")
    state = f"{STATE_BYTES_PER_PARAMETER:.0f} bytes a parameter"
    told += [
        f"{OTHER_TOKENS_SHARE:.0%} of the learner's tokens are prompts and tool output",
        f"the learner holds {state} over its ranks, with activation checkpointing",
        "waiting for tools and for stragglers is hidden by other episodes (slots are full)",
    ]
    return tuple(told)


def describe(proposal: Plan) -> str:
    """The plan as text, a proposal first and its assumptions last."""
    best = proposal.best
    lines = [
        f"{best.rollout_gpus} GPUs for rollouts ({best.replicas} x tensor parallel {best.tensor_parallel}), "
        f"{best.learner_gpus} for the learner",
        f"  {best.tokens_per_s:.0f} sampled tokens/s, a step every {proposal.step_s:.0f} s",
        f"  idle: rollouts {best.rollout_idle:.0%}, learner {best.learner_idle:.0%}; "
        f"learner's memory {best.learner_memory_gib:.0f} GiB a GPU",
        f"  weights: {proposal.weights_gib:.1f} GiB a version; "
        f"WEIGHTS_SIZE of at least {proposal.weights_volume_gib:.0f} GiB",
    ]
    if proposal.network_s is not None:
        share = proposal.network_s / proposal.step_s
        whole = f"  one whole version takes {proposal.network_s:.1f} s to another machine, {share:.0%} of a step"
        lines.append(whole + ("" if share < 1 else ": replicas there fall behind, versions are passed over"))
    for other in proposal.others[:3]:
        lines.append(
            f"or {other.rollout_gpus} + {other.learner_gpus}: {other.tokens_per_s:.0f} tokens/s, "
            f"idle {other.rollout_idle:.0%} and {other.learner_idle:.0%}"
        )
    lines += ["assuming that", *(f"  - {assumption}" for assumption in proposal.assumptions)]
    return "\n".join(lines)
