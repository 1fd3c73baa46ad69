"""The learner as a process: torchrun, gloo, a real Redis, a recorded stream."""

from __future__ import annotations

import json
import signal
import subprocess
import tempfile
import urllib.request
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from redis import Redis

from singlestream.contracts import (
    EndOfRun,
    PolicyVersion,
    PosteriorUpdate,
    Tombstone,
    decode_as,
)
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys
from tests.services.learner.recorded import Run, append, lease, record, trajectory
from tests.services.learner.waiting import end, read_log_until, resume_step, wait_until

pytestmark = pytest.mark.timeout(400)

MakeRun = Callable[..., Run]


def updates(redis: Redis, keys: Keys) -> list[PosteriorUpdate]:
    return [decode_as(PosteriorUpdate, fields[b"m"]) for _, fields in redis.xrange(keys.posterior_updates)]


def versions(redis: Redis, keys: Keys) -> list[PolicyVersion]:
    return [decode_as(PolicyVersion, fields[b"m"]) for _, fields in redis.xrange(keys.policy_versions)]


def state(redis: Redis, keys: Keys) -> str:
    return str(json.loads(redis.get(keys.learner) or b"{}").get("state"))


def fingerprint(run: Run) -> list[tuple[int, int, float]]:
    return [(record["step"], record["weights_crc32"], record["loss"]) for record in run.steps()]


def test_a_run_from_start_to_end(sync_redis: Redis, keys: Keys, make_run: MakeRun) -> None:
    rng = np.random.default_rng(0)
    sixteen = [trajectory(n, rng, version=0) for n in range(1, 17)]
    stone = Tombstone(lease_id=lease(17), prompt_id="p17", reason="attempts", detail="", attempts=3)
    append(sync_redis, keys, [*sixteen[:6], sixteen[0], stone, *sixteen[6:]])
    sync_redis.xadd(keys.trajectories, {"id": lease(18), "m": b"damaged"})
    # at step 2 what version 0 sampled is two updates old, one more than the bound
    last = [trajectory(19, rng, version=0), trajectory(20, rng, version=2)]
    append(sync_redis, keys, [*last, EndOfRun(reason="recorded")])
    run = make_run(run={"total_steps": 9, "max_staleness": 1, "hard_staleness": 1})
    run.finish()

    steps = run.steps()
    assert [(s["step"], s["trajectories"], s["stale"]) for s in steps] == [(1, 8, 0), (2, 8, 0), (3, 1, 1)]
    assert [s["drift_source"] for s in steps] == ["next_batch", "next_batch", "trained_batch"]
    assert all(s["grad_norm"] > 0 for s in steps[:2])

    sent = updates(sync_redis, keys)
    outcomes = {n: [u.lease_id for u in sent if u.outcome == n] for n in ("trained", "stale", "failed")}
    assert outcomes["trained"] == [lease(n) for n in (*range(1, 17), 20)]
    assert (outcomes["stale"], outcomes["failed"]) == ([lease(19)], [lease(18)])
    assert len(sent) == 19, "the tombstone's lease was closed by the replica"
    assert sync_redis.xlen(keys.dead_letters) == 1

    published = versions(sync_redis, keys)
    assert [(v.version, v.lineage) for v in published] == [(0, 1), (1, 1), (2, 1), (3, 1)]
    assert published[0].z == published[0].drift == 0
    assert [v.z for v in published] == sorted(v.z for v in published)
    files = sorted(Path(published[0].manifest.path).parent.iterdir())
    assert files == [Path(v.manifest.path) for v in published[2:]], "the newest two are kept"
    for entry in published[-1].manifest.tensors:
        data = files[-1].read_bytes()[entry.offset : entry.offset + entry.nbytes]
        assert zlib.crc32(data) == entry.crc32
        assert len(data) == 4 * int(np.prod(entry.shape))

    beat = json.loads(sync_redis.get(keys.learner) or b"")
    assert (beat["state"], beat["step"], beat["total_steps"]) == ("finished", 3, 9)
    pointer = (sync_redis.get(keys.resume) or b"").decode()
    state = json.loads((run.folder / "runs" / run.name / "checkpoints" / pointer / "state.json").read_text())
    assert (state["step"], state["ended"]) == (3, True)
    assert state["consumed"] == {"5f3a9c01": [20, []]}


def test_published_weights_are_the_models_own(sync_redis: Redis, keys: Keys, make_run: MakeRun) -> None:
    """Version 0 before any training, as bfloat16: every tensor of the checkpoint under its own name."""
    append(sync_redis, keys, [EndOfRun(reason="nothing to do")])
    run = make_run(run={"engine_dtype": "bfloat16"})
    run.finish()
    from transformers import AutoModelForCausalLM

    manifest = versions(sync_redis, keys)[0].manifest
    data = bytearray(Path(manifest.path).read_bytes())
    expected = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.bfloat16).state_dict()
    assert {e.name for e in manifest.tensors} == expected.keys() - {"lm_head.weight"}
    for entry in manifest.tensors:
        flat = torch.frombuffer(data, dtype=torch.bfloat16, count=entry.nbytes // 2, offset=entry.offset)
        assert torch.equal(flat.view(entry.shape), expected[entry.name])


def test_a_killed_learner_goes_on_as_if_nothing_had_happened(sync_redis: Redis, keys: Keys, make_run: MakeRun) -> None:
    undisturbed = make_run("u", run={"total_steps": 7})
    record(sync_redis, Keys(undisturbed.name), 56)
    undisturbed.finish()
    assert len(undisturbed.steps()) == 7

    run = make_run(run={"total_steps": 7})
    record(sync_redis, keys, 56, last=32)
    process = run.start()
    # beyond the checkpoint of step 2, which is written beside the next steps
    wait_until(lambda: len(run.steps()) >= 3 and resume_step(sync_redis, keys) >= 2, process)
    process.kill()
    process.wait()
    # what it published last, and measured high
    newest = max((int(version), float(z)) for version, z in sync_redis.hgetall(keys.clock).items())  # type: ignore[union-attr]
    sync_redis.hset(keys.clock, str(newest[0] + 1), repr(newest[1] + 1.0))
    record(sync_redis, keys, 56, first=33)
    run.finish()

    clock = {int(version): float(z) for version, z in sync_redis.hgetall(keys.clock).items()}  # type: ignore[union-attr]
    assert [clock[version] for version in range(8)] == sorted(clock.values()), "z never falls"
    assert fingerprint(run) == fingerprint(undisturbed)
    trained = [u.lease_id for u in updates(sync_redis, keys)]
    assert set(trained) == {lease(n) for n in range(1, 57)}
    assert {s["lineage"] for s in run.steps()} == {1, 2}
    walls = [s["wall_s"] for s in run.steps()]
    assert walls == sorted(walls), "the clock goes on from the first start"
    again = [v for v in versions(sync_redis, keys) if v.lineage == 2]
    assert [v.z for v in again] == [clock[v.version] for v in again], "what was written first holds for it too"
    assert again[0].version in (2, 4), "the checkpoint's weights are published at once"


def test_resume_on_other_numbers_of_ranks_past_a_truncated_checkpoint_and_never_from_a_foreign_one(
    sync_redis: Redis, keys: Keys, make_run: MakeRun
) -> None:
    record(sync_redis, keys, 64)
    weights = {}
    undisturbed = make_run("u", run={"total_steps": 6})
    record(sync_redis, Keys(undisturbed.name), 64)
    undisturbed.finish()
    expected = torch.from_numpy(np.fromfile(versions(sync_redis, Keys(undisturbed.name))[-1].manifest.path, np.float32))
    for ranks, total in ((2, 2), (1, 4), (2, 6)):
        run = make_run(run={"total_steps": total})
        run.finish(ranks)
        weights[total] = torch.from_numpy(np.fromfile(versions(sync_redis, keys)[-1].manifest.path, np.float32))
    # a step moves a weight by about 1e-3: moments that went astray at a resume would show
    torch.testing.assert_close(weights[6], expected, rtol=0, atol=1e-4)
    folder = run.folder / "runs" / run.name / "checkpoints"
    newest = folder / (sync_redis.get(keys.resume) or b"").decode()
    shard = next(newest.glob("__1_0.distcp"))
    shard.write_bytes(shard.read_bytes()[:-100])
    output = make_run(run={"total_steps": 6}).finish(1)
    assert f"checkpoint refused: {newest.name}: __1_0.distcp has" in output
    assert [s["step"] for s in run.steps()] == [1, 2, 3, 4, 5, 6]
    again = torch.from_numpy(np.fromfile(versions(sync_redis, keys)[-1].manifest.path, np.float32))
    torch.testing.assert_close(again, weights[6], rtol=0, atol=1e-4)
    trained = [u.lease_id for u in updates(sync_redis, keys)]
    assert set(trained) == {lease(n) for n in range(1, 49)}, "a later start took no lease twice or ahead"

    for path in folder.iterdir():
        state = json.loads((path / "state.json").read_text())
        state["identity"]["run.name"] = "another"
        (path / "state.json").write_text(json.dumps(state))
    process = run.start()
    output = end(process)
    assert process.returncode == 1
    assert f"it is not of this run or model: run.name was another, is {run.name}" in output


def test_sigterm_while_waiting_leaves_a_checkpoint_and_ends_well(
    sync_redis: Redis, keys: Keys, make_run: MakeRun
) -> None:
    record(sync_redis, keys, 32, last=11)
    run = make_run(run={"engine_dtype": "bfloat16"}, learner={"checkpoint_every": 100, "wait_warn_s": 1.0, "lr": 1e-6})
    run.learner["weights_url"] = f"http://127.0.0.1:{run.port}"
    process = run.start()
    wait_until(lambda: state(sync_redis, keys) == "waiting", process)
    status = json.loads(sync_redis.get(keys.learner) or b"")
    assert status["waiting_for"] == "trajectories: 3 of 8 have arrived"
    metrics = f"http://127.0.0.1:{run.port}/metrics"  # written beside the loop, once the version is announced
    wait_until(lambda: b"learner_step 1.0" in urllib.request.urlopen(metrics, timeout=60).read(), process)
    manifest = versions(sync_redis, keys)[-1].manifest
    served = urllib.request.urlopen(f"http://127.0.0.1:{run.port}/weights/{Path(manifest.path).name}", timeout=60)
    assert served.read() == Path(manifest.path).read_bytes()
    assert manifest.remote is not None
    assert [(delta.base_version, delta.version) for delta in manifest.remote.deltas] == [(0, 1)]
    assert 0 < run.steps()[0]["delta_ratio"] < 0.2, "few bfloat16 values move at a small learning rate"
    ready = urllib.request.urlopen(f"http://127.0.0.1:{run.port}/readyz", timeout=60)
    assert ready.status == 200
    read_log_until("waiting for trajectories: 3 of 8 have arrived", process)
    process.send_signal(signal.SIGTERM)
    output = end(process)
    assert process.returncode == 0, output
    pointer = (sync_redis.get(keys.resume) or b"").decode()
    assert pointer.startswith("step-00000001-")


def test_a_second_learner_fences_the_first(sync_redis: Redis, keys: Keys, make_run: MakeRun) -> None:
    record(sync_redis, keys, 32, last=4)
    first = make_run()
    process = first.start()
    wait_until(lambda: state(sync_redis, keys) == "waiting", process)
    sync_redis.set(keys.fence("learner"), "another")
    output = end(process)
    assert process.returncode == 1
    assert "another learner has taken over" in output


def test_silence_ends_the_wait_with_its_cause(sync_redis: Redis, keys: Keys, make_run: MakeRun) -> None:
    process = make_run(learner={"wait_timeout_s": 2.0}).start(2)
    output = end(process)
    assert process.returncode == 1
    assert "s for trajectories: 0 of 8 have arrived" in output
    assert "rank 0 failed: DeadlineExceeded" in output, "the other rank knows the cause"


def test_three_steps_that_are_not_finite_stop_the_run(sync_redis: Redis, keys: Keys, make_run: MakeRun) -> None:
    record(sync_redis, keys, 64)
    run = make_run(run={"total_steps": 8}, learner={"lr": 1e30, "checkpoint_every": 100})
    process = run.start()
    output = end(process)
    assert process.returncode == 1
    assert "3 steps in a row were not finite" in output
    assert "step 2 skipped" in output or "step 3 skipped" in output


def test_a_taken_port_is_a_clear_error(keys: Keys, make_run: MakeRun) -> None:
    import socket

    run = make_run()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", run.port))
        taken.listen()
        process = run.start()
        output = end(process)
    assert process.returncode == 1
    assert f"learner.metrics_port: cannot bind 127.0.0.1:{run.port}" in output


def test_help_is_there_without_torch() -> None:
    import sys

    code = (
        "import sys; from services.learner.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    reply = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert reply.stdout.splitlines()[-1] == "False"


def test_redis_may_go_away_and_come_back(make_run: MakeRun) -> None:
    with tempfile.TemporaryDirectory(prefix="ss-") as folder:
        server = EmbeddedRedis(Path(folder))
        server.start()
        try:
            run = make_run()
            run.redis_url, keys = server.url, Keys(run.name)
            with Redis(unix_socket_path=str(server.socket)) as client:
                record(client, keys, 32, last=11)
                process = run.start()
                wait_until(lambda: state(client, keys) == "waiting", process)
            server.kill()
            read_log_until("redis is away (trajectories)", process)
            server.start()
            with Redis(unix_socket_path=str(server.socket)) as client:
                record(client, keys, 32, first=12)
                output = end(process)
                assert process.returncode == 0, output
                assert [s["step"] for s in run.steps()] == [1, 2, 3, 4]
                assert {u.lease_id for u in updates(client, keys)} == {lease(n) for n in range(1, 33)}
        finally:
            server.stop()
