"""The rollout service against the bare engine, weight updates against a plain copy: ``python -m benchmarks.rollout``.

Both sides of each comparison run in one process on one engine, in turns, so that a busy machine slows both.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
import tempfile
import time
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Figure, run
from services.rollout.environments.single_turn import SingleTurn
from services.rollout.process_env import apply_engine_variables
from singlestream.config import Config, RolloutConfig, RunConfig
from singlestream.contracts import Lease, Sampling, TensorEntry, WeightManifest, encode
from singlestream.embedded_redis import EmbeddedRedis

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0)
CONCURRENCY, RESPONSE_TOKENS = 64, 128
SMALL = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
LARGE = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 15, "num_attention_heads": 16}
LARGE_VOCABULARY = 32_000
PAIRS = 7
END = "e"
"""A token of the random policy, which samples each of its 128 about as often."""
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Case:
    """How long the answers are.

    Args:
        suffix: of the figures' names.
        max_tokens: longest answer.
        ends: whether `END` ends an answer.
        about: for the report.
    """

    suffix: str
    max_tokens: int
    ends: bool
    about: str


TOGETHER = Case("", 128, False, "128 tokens each, so that all end in the same step: the hardest case")
UNEVEN = Case("_uneven", 448, True, "about 120 tokens each, uneven as real answers are")
CASES = (TOGETHER, UNEVEN)


class Ending(SingleTurn):
    """A question and an answer, which ends as soon as the policy happens to sample `END`."""

    name = "ending"
    stop = (END,)


def make_model(folder: Path, shape: dict[str, int], vocabulary: int) -> Any:
    """A random Qwen3 without an end of sequence, saved with a character tokenizer; returns the model."""
    import torch
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    heads = shape["num_attention_heads"]
    config = Qwen3Config(
        **shape,
        vocab_size=vocabulary,
        num_key_value_heads=heads,
        head_dim=shape["hidden_size"] // heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"?": 0} | {chr(n): n - 31 for n in range(32, 127) if n != 63}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")  # noqa: S106
    fast.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    fast.save_pretrained(folder)
    return model


def settings(folder: Path, model: Path, redis_url: str, cpu_threads: int | None = None) -> Config:
    """Settings of the benchmark's engine; one thread leaves the other cores to the replica, as a GPU would."""
    return Config(
        run=RunConfig(name=f"bench{next(_numbers)}", model=model, total_steps=1, redis_url=redis_url, runs_dir=folder),
        rollout=RolloutConfig(
            slots=CONCURRENCY,
            max_model_tokens=512,
            max_response_tokens=RESPONSE_TOKENS,
            cpu_threads=cpu_threads,
        ),
    )


@asynccontextmanager
async def engine_of(config: Config) -> AsyncIterator[Any]:
    """A running engine."""
    from transformers import AutoTokenizer

    from services.rollout.engine import VllmEngine
    from services.rollout.metrics import Metrics

    engine = VllmEngine(config, "bench", AutoTokenizer.from_pretrained(config.run.model), Metrics())
    await engine.start()
    try:
        yield engine
    finally:
        engine.close()


def questions(count: int) -> list[str]:
    """Prompts of 24 characters."""
    return ["".join(chr(97 + (7 * n + 3 * place + n // 26) % 26) for place in range(24)) for n in range(count)]


async def bare_tokens_per_s(engine: Any, asked: list[str], case: Case) -> float:
    """The engine alone: the same prompts and sampling, `CONCURRENCY` at a time."""
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    tokenizer = engine.tokenizer
    params = SamplingParams(
        max_tokens=case.max_tokens,
        temperature=1.0,
        logprobs=0,
        detokenize=False,
        stop_token_ids=[tokenizer.convert_tokens_to_ids(END)] if case.ends else [],
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    waiting = iter(asked)
    tokens = 0

    async def one_slot() -> None:
        nonlocal tokens
        for question in waiting:
            prompt = TokensPrompt(prompt_token_ids=tokenizer.encode(question), cache_salt=f"b{next(_numbers)}")
            async for output in engine.llm.generate(prompt, params, f"bare-{next(_numbers)}"):
                tokens += len(output.outputs[0].token_ids)

    started = time.monotonic()
    await asyncio.gather(*(one_slot() for _ in range(CONCURRENCY)))
    return tokens / (time.monotonic() - started)


async def _post(redis: Any, keys: Any, asked: list[str], environment: str) -> None:
    """Leases for the worker to take, as the value store writes them."""
    for n, question in enumerate(asked, 1):
        lease = Lease(
            lease_id=f"estimate:0000abcd:{n}",
            prompt_id=str(n),
            question=question,
            answer="",
            environment=environment,
            v_hat=0.5,
            version=0,
            sampling=SAMPLING,
            issued_at_s=time.time(),
        )
        entry = await redis.xadd(keys.leases("estimate"), {"id": lease.lease_id, "m": encode(lease)})
        await redis.hset(keys.live, lease.lease_id, entry)


async def service_tokens_per_s(engine: Any, config: Config, asked: list[str], case: Case) -> float:
    """The worker on a real Redis: from the first lease taken to the last trajectory emitted."""
    from services.rollout.environments import make_environment
    from services.rollout.lease_run import LeaseRunner
    from services.rollout.manifest import model_tensors
    from services.rollout.metrics import Metrics
    from services.rollout.tools import SandboxTools
    from services.rollout.weights import WeightKeeper
    from services.rollout.worker import RolloutWorker
    from singlestream.clients.sandbox import SandboxClient
    from singlestream.streams import Keys, LeaseConsumer, connect

    redis, keys, metrics = connect(config.run.redis_url), Keys(f"bench{next(_numbers)}"), Metrics()
    limits = config.rollout.model_copy(update={"max_response_tokens": case.max_tokens})
    name = f"{__name__ if __name__ != '__main__' else 'benchmarks.rollout'}:Ending" if case.ends else "single_turn"
    environment = make_environment(name, engine.tokenizer)
    await _post(redis, keys, asked, name)
    keeper = WeightKeeper(redis, keys, engine, model_tensors(config.run.model), limits, metrics)
    sandbox = SandboxClient(config.sandbox_url)
    runner = LeaseRunner(
        LeaseConsumer(redis, keys, "bench"),
        engine,
        keeper,
        lambda _: environment,
        lambda: SandboxTools(sandbox, limits, metrics),
        _always,
        limits,
        metrics,
    )
    worker = RolloutWorker(runner, "bench")
    started = time.monotonic()
    working = asyncio.create_task(worker.run())
    while metrics.turns._sum.get() < len(asked):  # asking Redis would slow the worker
        if working.done():
            working.result()
        await asyncio.sleep(0.01)
    seconds = time.monotonic() - started
    worker.stop()
    await working
    await sandbox.aclose()
    await redis.aclose()
    return metrics.action_tokens._value.get() / seconds


async def _always() -> bool:
    return True


async def _compare(engine: Any, config: Config, case: Case, quick: bool) -> list[Figure]:
    """Short runs in pairs, in changing order, so that a machine that grows busier favours neither side."""
    asked = questions(CONCURRENCY * (1 if quick else 4))
    service, bare = [], []
    for pair in range(1 if quick else PAIRS):
        for side in ("bare", "service") if pair % 2 == 0 else ("service", "bare"):
            if side == "bare":
                bare.append(await bare_tokens_per_s(engine, asked, case))
            else:
                service.append(await service_tokens_per_s(engine, config, asked, case))
    ratios = sorted(s / b for s, b in zip(service, bare, strict=True))
    note = f"{case.about}; {len(ratios)} pairs in turns, {ratios[0]:.3f} to {ratios[-1]:.3f}; aim 0.95"
    return [
        Figure(f"service_tokens_c64{case.suffix}", statistics.median(service), "tokens/s"),
        Figure(f"engine_tokens_c64{case.suffix}", statistics.median(bare), "tokens/s"),
        Figure(f"service_vs_engine_tokens_c64{case.suffix}", statistics.median(ratios), "ratio", note),
    ]


async def throughput(folder: Path, redis_url: str, quick: bool) -> list[Figure]:
    """Tokens/s through the service and of the bare engine, then updates of the same engine."""
    make_model(folder / "small", SMALL, 128)
    config = settings(folder, folder / "small", redis_url, cpu_threads=1)
    apply_engine_variables(config)
    async with engine_of(config) as engine:
        engine.tokenizer = engine._tokenizer
        await bare_tokens_per_s(engine, questions(CONCURRENCY), TOGETHER)
        figures = [figure for case in CASES for figure in await _compare(engine, config, case, quick)]
        return figures + await updates(engine, config, folder / "small", "small", 3 if quick else 9)


def write_weights(model_folder: Path, target: Path) -> WeightManifest:
    """Pack a model folder's tensors into one file, as the learner publishes them."""
    from safetensors.torch import load_file

    entries, offset = [], 0
    with target.open("wb") as file:
        for name, tensor in load_file(model_folder / "model.safetensors").items():
            import torch

            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            entries.append(
                TensorEntry(
                    name=name,
                    dtype="bfloat16",
                    shape=list(tensor.shape),
                    offset=offset,
                    nbytes=len(data),
                    crc32=zlib.crc32(data),
                )
            )
            file.write(data)
            offset += len(data)
    return WeightManifest(path=str(target), total_bytes=offset, tensors=entries)


def copy_seconds(path: Path) -> float:
    """A plain copy of the file's bytes, mapped, into memory that has been touched before.

    Fresh memory would add the kernel's time for clearing it, several times the copy's own.
    """
    source = np.memmap(path, np.uint8, "r")
    target = np.ones(source.shape, np.uint8)
    started = time.monotonic()
    np.copyto(target, source)
    return time.monotonic() - started


STAGES = {
    "pause_generation": "pause",
    "start_weight_update": "open_layers",
    "update_weights": "load",
    "finish_weight_update": "close_layers",
    "collective_rpc": "compare",
    "resume_generation": "resume",
}
"""What an update asks of the engine while it stands still, in order → its name in the figures."""


@contextmanager
def timed_stages(llm: Any) -> Iterator[dict[str, list[float]]]:
    """Seconds of every stage of the updates within the block."""
    seconds: dict[str, list[float]] = {stage: [] for stage in STAGES.values()}

    def timed(call: Callable[..., Any], stage: str) -> Callable[..., Any]:
        async def measured(*arguments: Any, **options: Any) -> Any:
            started = time.monotonic()
            try:
                return await call(*arguments, **options)
            finally:
                seconds[stage].append(time.monotonic() - started)

        return measured

    for method, stage in STAGES.items():
        setattr(llm, method, timed(getattr(llm, method), stage))
    try:
        yield seconds
    finally:
        for method in STAGES:
            delattr(llm, method)  # the class' own again


async def updates(engine: Any, config: Config, model: Path, name: str, repeats: int) -> list[Figure]:
    """Stall and total seconds of updates under four running generations, against a plain copy."""
    from services.rollout.generation import GenerationRequest
    from services.rollout.manifest import check_manifest, model_tensors, open_weights

    expected = model_tensors(model)
    stalls, totals, copies = [], [], []
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm", prefix="ss-bench-") as memory,
        timed_stages(engine.llm) as stages,
    ):
        manifest = write_weights(model, Path(memory) / "weights")
        for _ in range(repeats):
            running = [
                asyncio.create_task(
                    engine.generate(f"u-{next(_numbers)}", GenerationRequest([5 + n] * 16, SAMPLING, RESPONSE_TOKENS))
                )
                for n in range(4)
            ]
            await asyncio.sleep(0.1)
            copies.append(copy_seconds(Path(manifest.path)))
            started = time.monotonic()
            check_manifest(manifest, expected)
            with open_weights(manifest) as weights:
                await asyncio.to_thread(weights.check_bytes)
                stalls.append(await engine.swap_weights(weights.update, next(_numbers), 1, clear_cache=False))
            totals.append(time.monotonic() - started)
            await asyncio.gather(*running)
    size = f"plain copy of the same {manifest.total_bytes / 1e6:.1f} MB: {statistics.median(copies):.3g} s"
    ratio = statistics.median(s / c for s, c in zip(stalls, copies, strict=True))
    return [
        Figure(f"update_stall_s_{name}", statistics.median(stalls), "s", "generation stands still"),
        Figure(f"update_total_s_{name}", statistics.median(totals), "s", "checksums, pause, load, resume"),
        Figure(f"update_stall_vs_memcpy_{name}", ratio, "ratio", size),
        *(
            Figure(f"update_{stage}_s_{name}", statistics.median(seconds), "s", "of the stall")
            for stage, seconds in stages.items()
        ),
    ]


async def large_updates(folder: Path, redis_url: str, quick: bool) -> list[Figure]:
    """Updates of a model of about 500 MB."""
    make_model(folder / "large", LARGE, LARGE_VOCABULARY)
    config = settings(folder, folder / "large", redis_url)
    async with engine_of(config) as engine:
        return await updates(engine, config, folder / "large", "500mb", 2 if quick else 5)


def measure(quick: bool) -> list[Figure]:
    """All figures."""
    figures: list[Figure] = []
    parts: list[Callable[..., Any]] = [throughput, large_updates]
    with tempfile.TemporaryDirectory(prefix="ss-") as name:
        folder = Path(name)
        server = EmbeddedRedis(folder / "redis")
        server.start()
        try:
            for part in parts:
                figures += asyncio.run(part(folder, server.url, quick))
        finally:
            server.stop()
    return figures


if __name__ == "__main__":
    run("rollout", measure)
