"""What vLLM counts at every step of its engine, in the replica's own metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from services.rollout.metrics import Metrics

if TYPE_CHECKING:
    from vllm.v1.metrics.loggers import PrometheusStatLogger
    from vllm.v1.metrics.stats import IterationStats, SchedulerStats


def stat_logger(metrics: Metrics) -> type[PrometheusStatLogger]:
    """A logger class for ``AsyncLLM(stat_loggers=[…])`` that writes into ``metrics``.

    It descends from vLLM's Prometheus logger because that is how vLLM is told to leave its own out, which takes several
    observations a token and a registry of the whole process.
    """
    from vllm.v1.metrics.loggers import PrometheusStatLogger

    class StatLogger(PrometheusStatLogger):  # type: ignore[misc]  # vllm is not followed
        def __init__(self, vllm_config: Any, engine_indexes: list[int] | None = None) -> None:
            pass

        def record(
            self,
            scheduler_stats: SchedulerStats | None,
            iteration_stats: IterationStats | None,
            mm_cache_stats: Any = None,
            engine_idx: int = 0,
        ) -> None:
            if scheduler_stats is not None:
                metrics.kv_cache.set(scheduler_stats.kv_cache_usage)
                metrics.engine_running.set(scheduler_stats.num_running_reqs)
                metrics.engine_waiting.set(scheduler_stats.num_waiting_reqs)
                metrics.prefix_queries.inc(scheduler_stats.prefix_cache_stats.queries)
                metrics.prefix_hits.inc(scheduler_stats.prefix_cache_stats.hits)
            if iteration_stats is not None:
                metrics.sampled_tokens.inc(iteration_stats.num_generation_tokens)
                metrics.preemptions.inc(iteration_stats.num_preempted_reqs)

        def log_engine_initialized(self) -> None:
            pass

        def record_sleep_state(self, sleep: int = 0, level: int = 0) -> None:
            pass

        def record_admission_rejection(self, reason: str) -> None:
            pass

    return StatLogger
