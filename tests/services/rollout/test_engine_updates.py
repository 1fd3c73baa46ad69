"""The real engine: weights swapped under running requests, and every token's version checked against transformers."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import warnings
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from redis.asyncio import Redis

from services.rollout.engine import VllmEngine
from services.rollout.generation import EngineDead, Generation, GenerationRequest
from services.rollout.manifest import model_tensors
from services.rollout.metrics import Metrics
from services.rollout.process_env import apply_engine_variables
from services.rollout.weights import WeightKeeper
from singlestream.config import Config, RolloutConfig, RunConfig
from singlestream.contracts import Sampling
from singlestream.embedded_redis import EmbeddedRedis
from singlestream.streams import Keys, connect
from tests.services.rollout import policies

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore"),  # what vLLM's imports warn of is not ours
]

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0)
TOKENS = 300
STREAMS = 16
SAME, DIFFERENT = 0.02, 0.5


class Bench:
    """An engine, its two policies, and a keeper that loads what is published."""

    def __init__(self, engine: VllmEngine, folder: Path, redis: Redis, keys: Keys, tied: bool) -> None:
        self.engine, self.folder, self.redis, self.keys = engine, folder, redis, keys
        self.policies = {seed: policies.random_policy(seed, tied=tied, eos=None) for seed in (1, 2)}
        self.keeper = WeightKeeper(
            redis, keys, engine, model_tensors(folder / "model"), engine.config.rollout, Metrics()
        )
        self.version = 0

    async def publish(self, seed: int) -> int:
        """Announce one of the two policies as the next version."""
        self.version += 1
        manifest = policies.write_weights(self.policies[seed], self.folder / f"v{self.version}")
        await policies.publish(self.redis, self.keys, manifest, self.version, lineage=3)
        return self.version

    def prompt(self, number: int) -> list[int]:
        return [20 + (7 * number + 3 * place) % 90 for place in range(12)]

    async def sampled(self, tokens: int) -> None:
        """Wait until every running request has so many tokens."""
        states = self.engine.llm.output_processor.request_states
        async with asyncio.timeout(60):
            while not states or min(one.detokenizer.num_output_tokens() for one in states.values()) < tokens:
                await asyncio.sleep(0.01)

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
        run=RunConfig(name="engine", model=folder / "model", total_steps=1, engine_dtype="float32"),
        rollout=RolloutConfig(
            slots=32, max_model_tokens=512, max_response_tokens=400, kv_cache_gib=0.25, cpu_threads=1
        ),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SINGLESTREAM_TEST", "1")
        apply_engine_variables(config)
    torch.set_num_threads(1)
    engine = VllmEngine(config, "bench", policies.character_tokenizer(ends=False))
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
    await bench.sampled(40)
    new = await bench.publish(2)
    await bench.keeper.ensure(new, 3)
    crossed = 0
    for number, generation in enumerate([await one for one in running]):
        assert len(generation.token_ids) == len(generation.logprobs) == TOKENS
        assert generation.finish == "length"
        assert {span.lineage for span in generation.spans} == {3}
        spans = spans_of(generation)
        assert set(spans) <= {old, new}
        switch = spans[old][1] if old in spans else 0
        crossed += 0 < switch < TOKENS
        ids = bench.prompt(number) + generation.token_ids
        told = torch.tensor(generation.logprobs)
        right = policies.reference_logprobs(bench.policies[1], bench.policies[2], ids, 12, switch)
        wrong = policies.reference_logprobs(bench.policies[2], bench.policies[1], ids, 12, switch)
        assert (told - right).abs().max() < SAME
        assert (told - wrong).abs().mean() > DIFFERENT
    assert crossed >= 8


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


async def test_health_answers_while_busy(bench: Bench) -> None:
    running = [bench.start(number) for number in range(STREAMS)]
    await bench.engine.check_health()
    await asyncio.gather(*running)


def damage(file: Path, offset: int) -> None:
    data = bytearray(file.read_bytes())
    data[offset : offset + 4] = b"\x01\x02\x03\x04"
    file.write_bytes(data)


async def test_a_damaged_file_is_refused_before_the_engine_is_touched(bench: Bench) -> None:
    held = bench.engine.held
    bench.version += 1
    manifest = policies.write_weights(bench.policies[1], bench.folder / "damaged")
    damage(Path(manifest.path), manifest.tensors[5].offset)
    await policies.publish(bench.redis, bench.keys, manifest, bench.version, lineage=3)
    async with asyncio.timeout(20):
        while "checksum" not in bench.keeper.last_error:
            await asyncio.sleep(0.05)
    assert bench.engine.held == held
    assert (await bench.start(1)).finish == "length"
    good = await bench.publish(1)
    await bench.keeper.ensure(good, 3)
    assert bench.engine.held == (good, 3)


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
