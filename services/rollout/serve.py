"""The replicas as one Ray Serve application: started, checked, replaced and drained by Serve.

On one machine the service brings its own Ray; with ``rollout.ray_address`` it joins a cluster. Training work is pulled
from Redis by each replica, so Serve routes only the HTTP interface, and sees a busy replica as idle.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from fastapi import FastAPI
from prometheus_client import CollectorRegistry, start_http_server
from ray import serve
from ray.serve.config import RequestRouterConfig

from services.rollout.api import create_app
from services.rollout.process_env import apply_engine_variables, guarded, has_gpu
from services.rollout.ray_start import patiently
from services.rollout.scaling import OBJECT_STORE_BYTES, SLOT_RESOURCE
from singlestream.config import Config, load_config
from singlestream.errors import DeadlineExceeded
from singlestream.streams import Keys
from singlestream.telemetry import setup_logging

if TYPE_CHECKING:
    from services.rollout.replica import Control

log = logging.getLogger(__name__)

APPLICATION, DEPLOYMENT = "rollout", "replica"
CONTROL_S = 30.0
"""Every replica answers a broadcast within this, or the operator hears of it."""
STICKY_ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
"""Requests with one ``X-Session-Id`` go to one replica, whose prefix cache has the conversation, while it lives."""
WATCH_S = 5.0
POLL_S = 0.5
METRICS_VARIABLE = "SINGLESTREAM_NODE_METRICS"
"""Set on a node that holds so many replicas: each answers its own metrics at rollout.host, from rollout.port on."""


def build_app() -> FastAPI:
    """The HTTP interface of this process's replica. Imports late: the driver needs no model."""
    from services.rollout.replica import current

    return create_app(current)


@serve.deployment
@serve.ingress(build_app)
class RolloutDeployment:
    """One replica under Serve.

    Args:
        settings: sections ``run`` and ``rollout`` of the configuration, as JSON values with absolute paths.
        omp_threads: the user's OMP_NUM_THREADS; None drops the one that Ray sets, which would give the engine a single
            thread.
    """

    async def __init__(self, settings: dict[str, Any], omp_threads: str | None) -> None:  # type: ignore[misc]
        setup_logging("rollout")
        os.environ.pop("OMP_NUM_THREADS", None)
        if omp_threads is not None:
            os.environ["OMP_NUM_THREADS"] = omp_threads
        config = Config(**settings)
        apply_engine_variables(config)
        from services.rollout.replica import Replica, make_current

        self.replica = Replica(config)
        _serve_metrics(config, self.replica.metrics.registry)
        make_current(self.replica)  # this class is shipped by value and has no module of its own
        self.replica.broadcast = _broadcast
        await self.replica.start()
        self._watch = asyncio.create_task(self._end_with_worker(), name="end-with-worker")

    async def _end_with_worker(self) -> None:
        """A worker that ended by itself takes the process along: Serve then starts a new one at once."""
        try:
            await self.replica.wait()
        except Exception:  # the boundary of the process
            log.exception("replica %s ends; Serve starts another", self.replica.name)
            os._exit(1)

    async def check_health(self) -> None:
        """Asked by Serve; raises if the engine is dead or hung."""
        await self.replica.check_health()

    async def control(self, action: Control) -> dict[str, Any]:
        """Called on every replica by `_broadcast`."""
        return await self.replica.control(action)

    async def __del__(self) -> None:
        """Hand unfinished episodes over before Serve ends the process."""
        if getattr(self, "replica", None) is not None:
            await self.replica.stop()


async def _broadcast(action: Control) -> list[dict[str, Any]]:
    """Call `RolloutDeployment.control` on every replica that runs now."""
    handle = serve.get_deployment_handle(DEPLOYMENT, APPLICATION)
    return list(await handle.broadcast("control", action).results_async(timeout_s=CONTROL_S))


def _serve_metrics(config: Config, registry: CollectorRegistry) -> None:
    """Answer one replica's metrics on the first free port of its node's: Serve's interface asks any replica."""
    for port in range(config.rollout.port, config.rollout.port + int(os.environ.get(METRICS_VARIABLE, "0"))):
        try:
            start_http_server(port, config.rollout.host, registry)
            return
        except OSError:
            continue


def application(config: Config) -> Any:
    """The Serve application of a run; Ray must be up, for it depends on the cluster's resources."""
    rollout = config.rollout
    resources = _resources(config)
    options: dict[str, Any] = {"num_cpus": 0}
    if resources.get("GPU", 0) > 0:
        options["num_gpus"] = rollout.tensor_parallel
    if resources.get(SLOT_RESOURCE, 0) > 0:
        options["resources"] = {SLOT_RESOURCE: 1}
    run = config.run
    resolved = run.model_copy(
        update={
            "model": run.model.resolve(),
            "runs_dir": run.runs_dir.resolve(),
            "weights_dir": run.weights_dir.resolve(),
        }
    )
    settings = {"run": resolved.model_dump(mode="json"), "rollout": rollout.model_dump(mode="json")}
    settings["rollout"]["sandbox_url"] = config.sandbox_url  # the gateway's own section stays here
    if rollout.token is not None:
        settings["rollout"]["token"] = rollout.token.get_secret_value()
    if run.weights_token is not None:
        settings["run"]["weights_token"] = run.weights_token.get_secret_value()
    deployment = RolloutDeployment.options(  # type: ignore[attr-defined]
        name=DEPLOYMENT,
        ray_actor_options=options,
        **_replica_count(config, by_slots="resources" in options),
        request_router_config=RequestRouterConfig(request_router_class=STICKY_ROUTER),
        max_ongoing_requests=2 * rollout.slots,
        health_check_period_s=5.0,
        health_check_timeout_s=rollout.engine_timeout_s + 10.0,
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=3 * rollout.stop_timeout_s,
    )
    return deployment.bind(settings, os.environ.get("OMP_NUM_THREADS"))


def from_environment(arguments: dict[str, str]) -> Any:
    """The application of a RayService (``import_path``): the run that ``SINGLESTREAM_CONFIG`` of the head names.

    Raises `ConfigError` for an address that others reach without a token.
    """
    return application(guarded(load_config()))


def _resources(config: Config) -> dict[str, float]:
    """What the cluster has. Nodes join one that is only just starting: the first with a slot is waited for.

    Raises `DeadlineExceeded` where none comes: elsewhere a replica would find neither model nor weights.
    """
    started = time.monotonic()
    while not (resources := dict(ray.cluster_resources())).get(SLOT_RESOURCE):
        waited_s = time.monotonic() - started
        if config.rollout.ray_address is None:
            log.warning("this machine has no room for a replica: no %s", SLOT_RESOURCE)
            break
        if waited_s > config.rollout.engine_start_timeout_s:
            raise DeadlineExceeded(f"a node of the cluster with the resource {SLOT_RESOURCE}", waited_s)
        time.sleep(POLL_S)
    return resources


def _replica_count(config: Config, by_slots: bool) -> dict[str, Any]:
    """Options for a number of replicas that follows the nodes' slots, or for a fixed one where nodes name no slots."""
    rollout = config.rollout
    if not by_slots:
        return {"num_replicas": rollout.replicas}
    policy = {
        "resource": SLOT_RESOURCE,
        "redis_url": config.run.redis_url,
        "cap_key": Keys(config.run.name).rollout_cap,
        "default_cap": rollout.replicas if rollout.ray_address is None else None,
        "initial": rollout.replicas,
    }
    return {
        "autoscaling_config": {
            "min_replicas": 0,
            "initial_replicas": rollout.replicas,
            "max_replicas": 1024,
            "upscale_delay_s": 0.0,
            "downscale_delay_s": 5.0,
            "metrics_interval_s": 5.0,
            "policy": {"policy_function": "services.rollout.scaling:FillNodes", "policy_kwargs": policy},
        }
    }


def start_ray(config: Config) -> None:
    """Join ``rollout.ray_address``, or start a private Ray on this machine. Raises `DeadlineExceeded`."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    root = str(Path(__file__).resolve().parents[2])
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.environ["PYTHONPATH"] = os.pathsep.join([root, *(path for path in paths if path and path != root)])
    if config.rollout.ray_address is not None:
        ray.init(address=config.rollout.ray_address, logging_level=logging.WARNING)
        return
    start = partial(
        ray.init,
        address="local",
        num_cpus=max(4, os.cpu_count() or 1),
        resources={SLOT_RESOURCE: _local_slots(config)},
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        logging_level=logging.WARNING,
    )
    # a short folder: Ray's sockets lie in it
    patiently(lambda: start(_temp_dir=tempfile.mkdtemp(prefix="ss-ray-")), config.rollout.engine_start_timeout_s)
    log.info("Ray runs here; nodes join it at %s", ray.get_runtime_context().gcs_address)


def _local_slots(config: Config) -> int:
    """Replicas that fit on this machine: by its GPUs, or as many as the settings allow."""
    if not has_gpu():
        return max(config.rollout.max_replicas, config.rollout.replicas)
    import torch

    return int(torch.cuda.device_count()) // config.rollout.tensor_parallel


class _Stop(BaseException):
    """SIGTERM or SIGINT arrived."""


def _raise_stop(signum: int, frame: Any) -> None:
    raise _Stop


def run_serve(config: Config) -> int:
    """Run the application until SIGTERM or SIGINT; returns the exit code, 1 if Serve gave up on it."""
    code = 0
    try:
        start_ray(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _raise_stop)
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": config.rollout.host, "port": config.rollout.port},
        )
        serve.run(application(config), name=APPLICATION, route_prefix="/")
        log.info("%d replicas at http://%s:%d", config.rollout.replicas, config.rollout.host, config.rollout.port)
        code = _watch()
    except _Stop:
        log.info("stopping: the replicas hand their episodes over")
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if ray.is_initialized():
            serve.delete(APPLICATION)
            serve.shutdown()
            ray.shutdown()
    return code


def _watch() -> int:
    """Report what Serve says of the application whenever it changes; returns 1 when it has failed for good."""
    said = ""
    while True:
        status = serve.status().applications.get(APPLICATION)
        if status is None:
            log.error("the application is gone from Serve")
            return 1
        states = {name: dict(one.replica_states) for name, one in status.deployments.items()}
        now = f"{status.status}: replicas {states} {status.message}".strip()
        if now != said:
            log.info("Serve: %s", now)
            said = now
        if status.status in ("DEPLOY_FAILED", "NOT_STARTED"):
            return 1
        time.sleep(WATCH_S)
