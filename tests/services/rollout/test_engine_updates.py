"""The real engine: weights swapped under running requests, and every token's version checked against transformers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
import torch
from redis.asyncio import Redis
from transformers import Qwen3ForCausalLM

from services.rollout import weight_fetch
from services.rollout.engine import VllmEngine, _generation
from services.rollout.generation import EngineDead, Generation, GenerationRequest
from services.rollout.manifest import model_tensors, open_weights
from services.rollout.metrics import Metrics
from services.rollout.process_env import ENGINE_MEMORY, apply_engine_variables
from services.rollout.weight_fetch import WeightFetcher
from services.rollout.weights import WeightKeeper
from singlestream.config import Config, RolloutConfig, RunConfig
from singlestream.contracts import PolicyVersion, Sampling
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from tests.services.rollout import policies, weight_source
from tests.services.rollout.weight_source import until

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # what vLLM's imports warn of is not ours
]

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0)
TOKENS = 300
STREAMS = 16
SAME, DIFFERENT = 0.02, 0.5
ONE_KIND = pytest.mark.parametrize("bench", [False], indirect=True, ids=["untied"])
"""For what has nothing to do with how the output layer is held."""


class Bench:
    """An engine, its two policies, and a keeper that loads what is published."""

    def __init__(self, engine: VllmEngine, folder: Path, redis: Redis, keys: Keys, tied: bool) -> None:
        self.engine, self.folder, self.redis, self.keys = engine, folder, redis, keys
        self.policies = {seed: policies.random_policy(seed, tied=tied, eos=None) for seed in (1, 2)}
        self.metrics = Metrics()
        self.keeper = WeightKeeper(
            redis,
            keys,
            engine,
            model_tensors(folder / "model"),
            engine.config.rollout,
            self.metrics,
            WeightFetcher(engine.config.run, self.metrics, 60.0),
        )
        self.version = 0

    async def publish(self, seed: int) -> int:
        """Announce one of the two policies as the next version."""
        self.version += 1
        manifest = policies.write_weights(self.policies[seed], self.folder / f"v{self.version}")
        await policies.publish(self.redis, self.keys, manifest, self.version, lineage=3)
        return self.version

    async def announce(self, version: PolicyVersion) -> None:
        """Announce what a learner on another machine has published, as the next version."""
        self.version += 1
        assert version.version == self.version
        await policies.publish(self.redis, self.keys, version.manifest, version.version, version.lineage)

    async def loaded(self, version: int, lineage: int) -> None:
        """Wait for exactly this version: a lease's wait ends earlier where a later lineage is loaded."""
        await until(lambda: self.engine.held == (version, lineage), f"version {version}.{lineage}", 60.0)

    def prompt(self, number: int) -> list[int]:
        return [20 + (7 * number + 3 * place) % 90 for place in range(12)]

    async def sampled(self, tokens: int) -> None:
        """Wait until every running request has so many tokens."""
        states = self.engine.llm.output_processor.request_states
        async with asyncio.timeout(60):
            while not states or min(one.detokenizer.num_output_tokens() for one in states.values()) < tokens:
                await asyncio.sleep(0.01)

    @asynccontextmanager
    async def midway(self) -> AsyncIterator[None]:
        """Publish within the block: the engine stands still in the middle of all requests until the update reaches it.

        On a busy machine it might finish them first.
        """
        await self.sampled(40)
        [core] = [one for one in psutil.Process().children() if "EngineCore" in " ".join(one.cmdline())]
        core.suspend()
        try:
            yield
            await until(lambda: not self.engine._open.is_set(), "the update to begin", 60.0)
        finally:
            core.resume()

    def start(self, number: int) -> asyncio.Task[Generation]:
        request = GenerationRequest(self.prompt(number), SAMPLING, TOKENS)
        return asyncio.create_task(self.engine.generate(f"r{self.version}-{number}", request))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[True, False], ids=["tied", "untied"])
async def bench(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, redis_server: EmbeddedRedis
) -> AsyncIterator[Bench]:
    folder = tmp_path_factory.mktemp("engine")
    model = policies.random_policy(1, tied=request.param, eos=None)
    policies.save_policy(model, folder / "model", ends=False)
    config = Config(
        run=RunConfig(
            name="engine",
            model=folder / "model",
            total_steps=1,
            engine_dtype="float32",
            weights_dir=folder / "memory",
            weights_token=weight_source.TOKEN,
        ),
        rollout=RolloutConfig(
            slots=32, max_model_tokens=512, max_response_tokens=400, kv_cache_gib=0.25, cpu_threads=1
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SINGLESTREAM_TEST", "1")
        apply_engine_variables(config)
    torch.set_num_threads(1)
    engine = VllmEngine(config, "bench", policies.character_tokenizer(ends=False), Metrics())
    await engine.start()
    redis = connect(redis_server.url)
    one = Bench(engine, folder, redis, Keys(f"engine{int(request.param)}"), request.param)
    stop = asyncio.Event()
    keeper = asyncio.create_task(one.keeper.run(stop))
    yield one
    stop.set()
    with contextlib.suppress(EngineDead):
        await keeper
    engine.close()
    await redis.aclose()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gc.collect()  # the engine's client warns of its sockets when it is collected: here, not in another test


def spans_of(generation: Generation) -> dict[int, tuple[int, int]]:
    return {span.version: (span.start, span.end) for span in generation.spans}


async def test_every_token_matches_the_version_it_names(bench: Bench) -> None:
    """An update in the middle of running generations, with the cache kept."""
    old = await bench.publish(1)
    await bench.keeper.ensure(old, 3)
    running = [bench.start(number) for number in range(STREAMS)]
    async with bench.midway():
        new = await bench.publish(2)
    await bench.keeper.ensure(new, 3)
    assert await check_tokens(bench, running, {old: bench.policies[1], new: bench.policies[2]}) == STREAMS


Policies = dict[int, Qwen3ForCausalLM]


async def check_tokens(bench: Bench, running: list[asyncio.Task[Generation]], by: Policies) -> int:
    """Compare every token with the policy of the version it names, older first; returns how many crossed over."""
    old, new = by
    crossed = 0
    for number, generation in enumerate([await one for one in running]):
        assert len(generation.token_ids) == len(generation.logprobs) == TOKENS
        assert generation.finish == "length"
        spans = spans_of(generation)
        assert set(spans) <= {old, new}
        switch = spans[old][1] if old in spans else 0
        crossed += 0 < switch < TOKENS
        ids = bench.prompt(number) + generation.token_ids
        told = torch.tensor(generation.logprobs)
        right = policies.reference_logprobs(by[old], by[new], ids, 12, switch)
        wrong = policies.reference_logprobs(by[new], by[old], ids, 12, switch)
        assert (told - right).abs().max() < SAME
        assert (told - wrong).abs().mean() > DIFFERENT
    return crossed


async def test_the_same_with_a_delta_from_another_machine(
    bench: Bench, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The learner's own publisher and HTTP server: whole file first, a delta in the middle of running generations."""
    monkeypatch.setattr(weight_fetch, "BACKOFF_S", 0.01)
    before, after = bench.policies[1], policies.opposed(bench.policies[1])
    run = f"source{bench.folder.name}"
    with weight_source.source(bench.folder, redis_server.url, run, dtype="float32") as source:
        first = bench.version + 1
        await bench.announce(await asyncio.to_thread(source.publish, first, policies.tensors_of(before)))
        await bench.loaded(first, 1)
        running = [bench.start(number) for number in range(STREAMS)]
        async with bench.midway():
            await bench.announce(await asyncio.to_thread(source.publish, first + 1, policies.tensors_of(after)))
        await bench.loaded(first + 1, 1)
        assert await check_tokens(bench, running, {first: before, first + 1: after}) == STREAMS
        kinds = {kind: bench.metrics.fetches.labels(kind)._value.get() for kind in ("full", "delta")}
        assert kinds == {"full": 1, "delta": 1}
        assert source.publisher.delta_ratio is not None and source.publisher.delta_ratio < 0.2

        # what cannot be fetched is refused, and the engine goes on with what it has
        published = await asyncio.to_thread(source.publish, first + 2, policies.tensors_of(bench.policies[2]))
        for file in source.publisher.folder.glob(f"v{first + 2:08d}-*"):
            damage(file, file.stat().st_size // 2)
        await bench.announce(published)
        await until(lambda: "checksum differs" in bench.keeper.last_error, "the damaged file to be refused")
        assert bench.engine.held == (first + 1, 1)
        assert (await bench.start(1)).finish == "length"
        published = await asyncio.to_thread(source.publish, first + 3, policies.tensors_of(before))
        await bench.announce(published)
        await bench.loaded(first + 3, 1)
    # the learner is away: nothing changes, until it is back and publishes again
    away = published.model_copy(update={"version": first + 4})
    await bench.announce(away)
    await until(lambda: "without progress" in bench.keeper.last_error, "the fetch to be given up", 60.0)
    assert bench.engine.held == (first + 3, 1)
    assert (await bench.start(1)).finish == "length"
    back = await bench.publish(1)
    await bench.keeper.ensure(back, 3)


@ONE_KIND
async def test_with_clear_cache_what_is_running_is_computed_again_under_the_new_weights(bench: Bench) -> None:
    settings = bench.keeper.settings
    old = await bench.publish(1)
    await bench.keeper.ensure(old, 3)
    running = [bench.start(number) for number in range(4)]
    bench.keeper.settings = settings.model_copy(update={"clear_cache": True})
    async with bench.midway():
        new = await bench.publish(2)
    await bench.keeper.ensure(new, 3)
    bench.keeper.settings = settings
    crossed = 0
    for number, generation in enumerate([await one for one in running]):
        spans = spans_of(generation)
        switch = spans[old][1] if old in spans else 0
        crossed += 0 < switch < TOKENS
        ids = bench.prompt(number) + generation.token_ids
        told = torch.tensor(generation.logprobs)
        apart = [policies.reference_logprobs(one, one, ids, 12, 1) for one in (bench.policies[1], bench.policies[2])]
        assert (told - torch.cat([apart[0][:switch], apart[1][switch:]])).abs().max() < SAME
    assert crossed == len(running)


@ONE_KIND
async def test_a_refresh_loads_what_is_held_once_more(bench: Bench) -> None:
    held = await bench.publish(1)
    await bench.keeper.ensure(held, 3)
    loaded = bench.metrics.updates.labels("loaded")._value
    before = loaded.get()
    await bench.keeper.refresh()
    await until(lambda: loaded.get() == before + 1, "the version to be loaded again")
    assert bench.engine.held == (held, 3)


async def test_a_part_of_a_fused_layer_that_is_not_what_was_published_is_found(bench: Bench) -> None:
    """The engine holds version n; compared with a file in which one k_proj, or one row of the output layer, differs."""
    held = bench.policies[1]
    await bench.keeper.ensure(await bench.publish(1), 3)
    names = ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
    for name in names:
        other = policies.random_policy(1, tied=held.config.tie_word_embeddings, eos=None)
        with torch.no_grad():
            other.get_parameter(name)[-1] += 0.5
        manifest = policies.write_weights(other, bench.folder / "other")
        found = pytest.raises(Exception, match=f"{name} differs from the published file")
        with open_weights(manifest) as weights, found:
            await bench.engine.llm.collective_rpc("verify_weights", args=(weights.update,))
    with open_weights(policies.write_weights(held, bench.folder / "other")) as weights:
        [(compared, left_out)] = await bench.engine.llm.collective_rpc("verify_weights", args=(weights.update,))
    assert (compared, left_out) == (len(weights.manifest.tensors), [])


@ONE_KIND
async def test_a_later_request_finds_no_prefix_of_an_older_policy(bench: Bench) -> None:
    """The same prompt before and after an update: the second must not read the first one's cached keys and values."""
    seed = 1 if bench.version % 2 == 0 else 2
    await bench.keeper.ensure(await bench.publish(seed), 3)
    long_prompt = bench.prompt(0) * 12
    request = GenerationRequest(long_prompt, SAMPLING, 4)
    await bench.engine.generate("warm", request)
    await bench.keeper.ensure(await bench.publish(3 - seed), 3)
    generation = await bench.engine.generate("after", request)
    policy = bench.policies[3 - seed]
    right = policies.reference_logprobs(policy, policy, long_prompt + generation.token_ids, len(long_prompt), 1)
    assert (torch.tensor(generation.logprobs) - right).abs().max() < SAME


@ONE_KIND
async def test_an_aborted_turn_keeps_its_tokens_and_can_be_continued(bench: Bench) -> None:
    seed = 1 if bench.version % 2 == 0 else 2
    version = await bench.publish(seed)
    await bench.keeper.ensure(version, 3)
    running = bench.start(3)
    await bench.sampled(10)
    await bench.engine.abort(f"r{bench.version}-3")
    part = await running
    assert part.finish == "aborted"
    assert 0 < len(part.token_ids) < TOKENS
    assert spans_of(part) == {version: (0, len(part.token_ids))}
    prompt = bench.prompt(3) + part.token_ids
    rest = await bench.engine.generate("rest", GenerationRequest(prompt, SAMPLING, 20))
    ids = prompt + rest.token_ids
    policy = bench.policies[seed]
    right = policies.reference_logprobs(policy, policy, ids, 12, 1)
    assert (torch.tensor(part.logprobs + rest.logprobs) - right).abs().max() < SAME


@ONE_KIND
async def test_an_abort_is_not_lost_however_early_it_comes(bench: Bench) -> None:
    """A request is the engine's from the first moment: an abort in the next pass of the event loop finds it."""
    for number in range(3):
        running = bench.start(number)
        await asyncio.sleep(0)
        await bench.engine.abort(f"r{bench.version}-{number}")
        assert (await running).finish == "aborted"


@ONE_KIND
async def test_a_request_that_the_engine_fails_is_no_end_of_its_turn(bench: Bench) -> None:
    from vllm.outputs import CompletionOutput

    ended = CompletionOutput(0, "", [], None, [], finish_reason="abort")
    assert _generation(ended).finish == "aborted"
    ended.finish_reason = "error"
    with pytest.raises(EngineDead, match="ended a request with 'error'"):
        _generation(ended)


@ONE_KIND
async def test_stop_strings_of_several_tokens_end_a_turn(bench: Bench) -> None:
    """As ``</code>`` is for a real tokenizer: every sampled token is kept, the stop string's too."""
    letters = "abcdefghijklmnop"
    stops = tuple(one + two for one in letters for two in letters)
    request = GenerationRequest(bench.prompt(5), SAMPLING, 400, stops)
    tokenizer = policies.character_tokenizer()
    ended = 0
    for number, generation in enumerate(
        await asyncio.gather(*(bench.engine.generate(f"s{number}", request) for number in range(8)))
    ):
        text, before = (tokenizer.decode(generation.token_ids[:end]) for end in (None, -1))
        assert len(generation.logprobs) == len(generation.token_ids), number
        assert generation.spans[-1].end == len(generation.token_ids)
        assert not any(stop in before for stop in stops)
        assert (generation.finish == "stop") == any(stop in text for stop in stops)
        ended += generation.finish == "stop"
    assert ended >= 1


@ONE_KIND
async def test_no_shared_memory_of_the_engine_has_a_name_to_be_left_behind_by(bench: Bench) -> None:
    maps = [Path(f"/proc/{one.pid}/maps") for one in psutil.Process().children(recursive=True)]
    lines = {line for path in maps for line in path.read_text().splitlines() if ENGINE_MEMORY in line}
    assert lines
    assert all(line.endswith(" (deleted)") for line in lines)


@ONE_KIND
async def test_health_answers_while_busy(bench: Bench) -> None:
    running = [bench.start(number) for number in range(STREAMS)]
    await bench.engine.check_health()
    await asyncio.gather(*running)


def damage(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset : offset + 4] = b"\x01\x02\x03\x04"
    file.write_bytes(data)


@ONE_KIND
async def test_a_damaged_file_is_refused_before_the_engine_is_touched(bench: Bench) -> None:
    held = bench.engine.held
    bench.version += 1
    manifest = policies.write_weights(bench.policies[1], bench.folder / "damaged")
    damage(Path(manifest.path), manifest.tensors[5].offset)
    await policies.publish(bench.redis, bench.keys, manifest, bench.version, lineage=3)
    await until(lambda: "checksum" in bench.keeper.last_error, "the file to be refused")
    assert bench.engine.held == held
    assert (await bench.start(1)).finish == "length"
    good = await bench.publish(1)
    await bench.keeper.ensure(good, 3)
    assert bench.engine.held == (good, 3)


@ONE_KIND
async def test_an_update_that_fails_half_way_ends_the_engine(bench: Bench) -> None:
    update = {"path": "/nonexistent", "total_bytes": 4, "tensors": [("model.norm.weight", "float32", [1], 0)]}
    running = bench.start(2)
    with pytest.raises(EngineDead, match="update to version 99"):
        await bench.engine.swap_weights(update, 99, 3, clear_cache=False)
    with pytest.raises(EngineDead):
        await bench.start(1)
    with pytest.raises(EngineDead):
        await bench.engine.check_health()
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError, EngineDead):
        await running
