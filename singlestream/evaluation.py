"""From a job's results to a report: avg, maj and pass at k of each benchmark, with bootstrap intervals."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from singlestream.eval_metrics import Estimate, Sampled, average, majority_at, over_prompts, pass_at

if TYPE_CHECKING:
    from singlestream.clients.value_store import Job, JobResult


@dataclass(frozen=True)
class Benchmark:
    """What one source's prompts came to.

    Args:
        name: the prompts' source.
        prompts: prompts with at least one reward.
        samples: rewards.
        failed: samples that ended without a reward; they count for nothing, and a prompt with fewer than k rewards is
            left out of what is measured at k.
        response_tokens_mean: tokens after the prompt, tools' output included.
        tool_calls_mean: of one sample.
        avg: mean reward.
        maj: k → maj@k; empty where no answer was boxed.
        pass_: k → pass@k.
    """

    name: str
    prompts: int
    samples: int
    failed: int
    response_tokens_mean: float
    tool_calls_mean: float
    avg: Estimate
    maj: dict[int, Estimate] = field(default_factory=dict)
    pass_: dict[int, Estimate] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        """For JSON."""
        fields = asdict(self)
        return {"pass" if name == "pass_" else name: value for name, value in fields.items()}


def sizes(n: int) -> list[int]:
    """The k that are reported for n samples: the powers of two, and n."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def benchmarks(results: Iterable[JobResult], sources: Mapping[str, str], n: int) -> list[Benchmark]:
    """One report for each source, by name. Sources without a single reward are left out.

    Args:
        results: of an evaluation.
        sources: prompt id → source.
        n: samples that were asked for of each prompt.
    """
    by_source: dict[str, dict[str, list[JobResult]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        by_source[sources[result.prompt_id]][result.prompt_id].append(result)
    found = [_benchmark(name, list(prompts.values()), n) for name, prompts in sorted(by_source.items())]
    return [one for one in found if one is not None]


def _benchmark(name: str, prompts: Sequence[Sequence[JobResult]], n: int) -> Benchmark | None:
    scored = [[result for result in prompt if result.reward is not None] for prompt in prompts]
    everything = [result for prompt in scored for result in prompt]
    if not everything:
        return None
    sampled = [Sampled([r.reward or 0.0 for r in prompt], [r.answer for r in prompt]) for prompt in scored if prompt]
    enough = {k: [one for one in sampled if len(one.rewards) >= k] for k in sizes(n)}
    votes = any(result.answer is not None for result in everything)
    return Benchmark(
        name=name,
        prompts=len(sampled),
        samples=len(everything),
        failed=sum(len(prompt) for prompt in prompts) - len(everything),
        response_tokens_mean=sum(r.response_tokens for r in everything) / len(everything),
        tool_calls_mean=sum(r.tool_calls for r in everything) / len(everything),
        avg=over_prompts(sampled, average),
        maj={k: over_prompts(some, partial(majority_at, k=k)) for k, some in enough.items() if some and votes},
        pass_={k: over_prompts(some, partial(pass_at, k=k)) for k, some in enough.items() if some},
    )


def report(job: Job, found: Sequence[Benchmark]) -> dict[str, Any]:
    """Everything about an evaluation, for JSON; values lie in [0, 1], intervals are 95 %."""
    return {
        "job": job.job_id,
        "state": job.state,
        "pinned": job.pinned,
        "policy": {"version": job.version, "lineage": job.lineage} if job.pinned else None,
        "versions": job.versions,
        "n": job.n,
        "sampling": job.sampling.model_dump(),
        "created_at_s": job.created_at_s,
        "finished_at_s": job.finished_at_s,
        "benchmarks": [one.told() for one in found],
    }
