"""Rank 0's HTTP: ``/metrics`` for Prometheus, ``/healthz``, ``/readyz``, and weights where the settings say so."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, generate_latest

from services.learner.redis_link import Status
from services.learner.weights_http import PREFIX, STALL_S, WeightFiles, answer
from singlestream.errors import ConfigError

GAUGES = {
    "step": ("step", "Optimizer steps taken"),
    "loss": ("loss", "Policy loss of the last batch"),
    "reward_mean": ("reward_mean_ratio", "Mean reward of the last batch"),
    "entropy": ("entropy_nats", "Mean entropy of a sample of action tokens"),
    "grad_norm": ("grad_norm", "Gradient norm before clipping"),
    "lr": ("learning_rate", "Learning rate"),
    "approx_kl": ("approx_kl_nats", "Mean of r - 1 - log r over trained tokens"),
    "clip_low_share": ("clip_low_ratio", "Trained tokens held back by the lower clip"),
    "clip_high_share": ("clip_high_ratio", "Trained tokens held back by the upper clip"),
    "clip_dual_share": ("clip_dual_ratio", "Trained tokens held back by the dual clip"),
    "logprob_shift_mean": ("logprob_shift_mean_nats", "Mean |log p learner - log p engine| of trained tokens"),
    "logprob_shift_max": ("logprob_shift_max_nats", "Largest |log p learner - log p engine| of trained tokens"),
    "importance_weight_mean": ("importance_weight_mean", "Mean importance weight of trained tokens"),
    "importance_weight_clipped_share": ("importance_weight_clipped_ratio", "Weights at the truncation"),
    "importance_weight_masked_share": ("importance_weight_masked_ratio", "Weights that are zero"),
    "ess": ("effective_sample_size_ratio", "(sum w)^2 / (n sum w^2) over trained tokens"),
    "staleness_mean": ("staleness_mean_updates", "Mean staleness of trained tokens"),
    "staleness_max": ("staleness_max_updates", "Largest staleness of a trained token"),
    "tokens_per_s": ("tokens_per_second", "Tokens of the batch over the seconds of the step without waiting"),
    "learner_idle_ratio": ("idle_ratio", "Share of the step that was waiting"),
    "mfu": ("mfu_ratio", "Share of the devices' peak operations that the step used; no number where no peak is set"),
    "v_hat_mean": ("v_hat_mean_ratio", "Mean baseline of the last batch"),
    "drift": ("drift_nats", "Mean |log pi_new - log pi_old| on the probe"),
    "z": ("drift_clock", "Drift clock z"),
    "drift_noise": ("drift_noise_nats", "The probe scored twice with the same weights"),
    "drift_exact": ("drift_exact_nats", "Mean drift on previous responses of the batch's prompts, where one is kept"),
    "drift_clock": ("drift_exact_by_clock_nats", "What the drift clock says of the same spans"),
    "wait_s": ("wait_seconds", "Seconds the last step waited for trajectories"),
    "probe_s": ("probe_seconds", "Seconds the last step spent on drift probes and anchors"),
    "forward_backward_s": ("forward_backward_seconds", "Seconds of forward, backward and optimizer"),
    "publish_s": ("publish_seconds", "Seconds the last step was held up by the publication"),
    "publication_s": ("publication_seconds", "Seconds from the last snapshot of the weights to its announcement"),
    "delta_ratio": ("delta_bytes_ratio", "Bytes of the last weight delta over bytes of the weights"),
    "checkpoint_s": ("checkpoint_seconds", "Seconds the last step was held up by a checkpoint; 0 where none was begun"),
}
"""Field of ``steps.jsonl`` → (metric after ``singlestream_learner_``, what it is)."""
COUNTERS = {
    "anchors": ("exact_drifts", "Trajectories whose exact drift was measured"),
    "trajectories": ("trajectories", "Trajectories trained"),
    "stale": ("stale_trajectories", "Trajectories counted but too old to train"),
    "action_tokens": ("action_tokens", "Action tokens of trained trajectories"),
    "masked_tokens": ("masked_tokens", "Action tokens masked for their age"),
    "trained_tokens": ("trained_tokens", "Action tokens trained"),
    "groups": ("groups", "Groups of more than one trajectory trained"),
    "degenerate_groups": ("degenerate_groups", "Groups whose rewards were all equal: they train nothing"),
    "skipped": ("skipped_steps", "Steps skipped because something was not finite"),
}
POLL_S = 0.1
"""Closing takes at most so long."""
PERCENTILES = (10, 30, 50, 70, 90)


class Metrics:
    """The learner's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        prefix = "singlestream_learner_"
        self._gauges = {
            field: Gauge(prefix + name, text, registry=self.registry) for field, (name, text) in GAUGES.items()
        }
        self._counters = {
            field: Counter(prefix + name, text, registry=self.registry) for field, (name, text) in COUNTERS.items()
        }
        self._advantage = Gauge(
            prefix + "advantage", "Percentiles of A before normalisation", ["percentile"], registry=self.registry
        )
        self._tracking_failures = Counter(
            prefix + "tracking_failures", "Records that an observer did not take", ["observer"], registry=self.registry
        )

    def observe(self, record: dict[str, Any]) -> None:
        """Take over one record of ``steps.jsonl``; None stands for a number that is not finite."""
        for field, gauge in self._gauges.items():
            gauge.set(float("nan") if record[field] is None else record[field])
        for field, counter in self._counters.items():
            counter.inc(record[field])
        for percentile in PERCENTILES:
            self._advantage.labels(str(percentile)).set(record[f"advantage_p{percentile}"])

    def count_tracking_failure(self, observer: str) -> None:
        """Count a record, or an end, that an observer failed at."""
        self._tracking_failures.labels(observer).inc()

    def text(self) -> bytes:
        """The exposition."""
        return bytes(generate_latest(self.registry))


def _handler(metrics: Metrics, status: Status, files: WeightFiles | None) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = STALL_S

        def do_GET(self) -> None:
            if files is not None and self.path.startswith(PREFIX):
                answer(self, files)
            elif self.path == "/metrics":
                self._reply(200, CONTENT_TYPE_LATEST, metrics.text())
            elif self.path == "/healthz":
                self._reply(200, "application/json", status.to_json().encode())
            elif self.path == "/readyz":
                ready = status.version is not None
                waiting_for = status.waiting_for or None if ready else "the first publication of weights"
                body = {"ready": ready, "state": status.state, "waiting_for": waiting_for}
                self._reply(200 if ready else 503, "application/json", json.dumps(body).encode())
            else:
                self._reply(404, "text/plain", b"paths: /metrics /healthz /readyz\n")

        def do_HEAD(self) -> None:
            if files is not None and self.path.startswith(PREFIX):
                answer(self, files)
            else:
                self.send_error(405)

        def _reply(self, code: int, kind: str, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Requests of a scraper are no events."""

    return Handler


class MetricsServer:
    """Serves `Metrics`, and weight files where there are ``files``, on threads until closed.

    Raises:
        ConfigError: the port cannot be bound; says which and why.
    """

    def __init__(
        self, metrics: Metrics, status: Status, host: str, port: int, files: WeightFiles | None = None
    ) -> None:
        try:
            self._server = ThreadingHTTPServer((host, port), _handler(metrics, status, files))
        except OSError as error:
            raise ConfigError(f"learner.metrics_port: cannot bind {host}:{port}: {error.strerror}") from error
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(POLL_S,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)
