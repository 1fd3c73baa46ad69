"""The vLLM engine of one replica: samples turns, swaps weights under running requests, and says whether it is alive."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import logging
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from services.rollout.engine_stats import stat_logger
from services.rollout.generation import (
    EngineDead,
    Generation,
    GenerationRequest,
    Part,
    RequestRefused,
    VersionSpan,
    parse_label,
    version_label,
)
from services.rollout.metrics import Metrics
from services.rollout.process_env import has_gpu
from singlestream.config import Config
from singlestream.contracts import Sampling
from singlestream.errors import DeadlineExceeded

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.inputs import TokensInput
    from vllm.outputs import CompletionOutput
    from vllm.v1.engine.async_llm import AsyncLLM

log = logging.getLogger(__name__)

MODEL_FOLDER = (0, 0)
"""(version, lineage) of the weights that lie in the model's folder: older than anything a learner publishes."""


def replica_seed(run_seed: int, replica: str) -> int:
    """A 31-bit seed of the replica's own: engines that share a seed sample the same tokens."""
    return int.from_bytes(hashlib.sha256(f"{run_seed}:{replica}".encode()).digest()[:4], "little") >> 1


def engine_arguments(config: Config, seed: int) -> dict[str, Any]:
    """Arguments of ``AsyncEngineArgs`` on this machine's kind of device.

    Args:
        config: the run's settings.
        seed: of the engine's sampler.
    """
    from vllm.config import WeightTransferConfig

    from services.rollout.weight_transfer import BACKEND

    rollout = config.rollout
    arguments: dict[str, Any] = {
        "model": str(config.run.model.resolve()),
        "dtype": config.run.engine_dtype,
        "max_model_len": rollout.max_model_tokens,
        "max_num_seqs": rollout.slots,
        "tensor_parallel_size": rollout.tensor_parallel,
        "logprobs_mode": "processed_logprobs",
        "seed": seed,
        "disable_log_stats": True,
        "enable_prefix_caching": True,
        "generation_config": "vllm",
        "worker_extension_cls": "services.rollout.weight_transfer.WorkerExtension",
        "weight_transfer_config": WeightTransferConfig(backend=BACKEND),
    }
    if has_gpu():
        arguments |= {"gpu_memory_utilization": rollout.gpu_memory_share, "distributed_executor_backend": "mp"}
    else:
        arguments |= {
            "enforce_eager": True,
            "block_size": 32,
            "kv_cache_memory_bytes": int(rollout.kv_cache_gib * 2**30),
        }
    return arguments


FINISHES: dict[str | None, Literal["stop", "length", "aborted"]] = {
    "stop": "stop",
    "length": "length",
    "abort": "aborted",
}
"""vLLM's reason → ours. Any other is a fault of the engine's, which must not count as an end of the episode."""

DEATH_POLL_S = 1.0
CLOSE_S = 1.0
"""The engine's processes hold nothing worth saving: what has not ended by then is killed."""


class VllmEngine:
    """One vLLM engine.

    Args:
        config: the run's settings.
        replica: name of this replica; its sampling seed derives from it.
        tokenizer: the model's tokenizer, to find the stop strings that are single tokens.
        metrics: of the replica.
    """

    def __init__(self, config: Config, replica: str, tokenizer: Any, metrics: Metrics) -> None:
        self.config, self.replica, self._tokenizer, self.metrics = config, replica, tokenizer, metrics
        self.held: tuple[int, int] = MODEL_FOLDER
        self._llm: AsyncLLM | None = None
        self._open = asyncio.Event()
        self._broken: str | None = None
        self._gated: dict[str, bool] = {}
        self._stop_cache: dict[tuple[str, ...], tuple[list[int], list[str]]] = {}

    @property
    def llm(self) -> AsyncLLM:
        """The running engine. Raises `EngineDead` before `start` and after a failed update."""
        if self._llm is None or self._broken is not None:
            raise EngineDead(f"replica {self.replica}: {self._broken or 'the engine is not started'}")
        return self._llm

    async def start(self) -> None:
        """Start the engine's processes and load the model folder's weights. Raises `DeadlineExceeded`."""
        from vllm import AsyncEngineArgs, envs
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.v1.engine.async_llm import AsyncLLM

        started = time.monotonic()
        arguments = engine_arguments(self.config, replica_seed(self.config.run.seed, self.replica))
        async with _deadline("the engine to start", self.config.rollout.engine_start_timeout_s):
            # in a thread: it blocks until the engine is up, and signals and health checks must not wait
            start = partial(AsyncLLM.from_engine_args, stat_loggers=[stat_logger(self.metrics)])
            llm = await asyncio.to_thread(start, AsyncEngineArgs(**arguments))
            self._llm = llm
            await llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
            await llm.update_weight_version(version_label(*MODEL_FOLDER))
            await llm.collective_rpc("unlink_shared_memory")
            await llm.get_supported_tasks()  # kept from here on: no request waits for it (`_prompt`)
        envs.enable_envs_cache()  # vLLM asks for one with every token that it hands out
        gc.collect()
        gc.freeze()  # the modules and models loaded so far; a full collection over them holds every request up
        self._open.set()
        log.info("engine of replica %s started in %.1f s", self.replica, time.monotonic() - started)

    async def generate(self, request_id: str, request: GenerationRequest) -> Generation:
        """Sample one turn; waits while weights are being swapped. See `generation.Engine`."""
        from vllm.v1.engine.exceptions import EngineDeadError

        if not self._open.is_set() and await self._aborted_at_gate(request_id):
            return Generation([], [], [], "aborted")
        final, prompt = None, self._prompt(request.prompt_ids)
        try:
            with self.metrics.generation_seconds.time():
                async for output in self.llm.generate(prompt, self._sampling(request), request_id):
                    final = output
        except EngineDeadError as error:
            raise EngineDead(f"replica {self.replica}: the engine died: {error}") from error
        if final is None:
            raise EngineDead(f"replica {self.replica}: the engine ended request {request_id} without an output")
        return _generation(final.outputs[0])

    def _prompt(self, token_ids: list[int]) -> TokensInput:
        """A prompt as the engine's own renderer would make it, so that nothing is awaited before it is registered.

        A request that waits for the renderer's thread is one that an abort does not find, and its salt may be that of
        weights that are swapped meanwhile: old-policy prefixes must not be found by requests that start under newer
        ones.
        """
        from vllm.inputs import tokens_input

        return tokens_input(token_ids, cache_salt=version_label(*self.held))

    async def _aborted_at_gate(self, request_id: str) -> bool:
        """Wait until weights have been swapped; True if the request was aborted meanwhile."""
        self._gated[request_id] = False
        try:
            await self._open.wait()
            return self._gated[request_id]
        finally:
            del self._gated[request_id]

    async def stream(
        self,
        request_id: str,
        prompt_ids: list[int],
        *,
        max_tokens: int,
        temperature: float,
        top_p: float,
        top_k: int,
        stop: tuple[str, ...],
    ) -> AsyncIterator[Part]:
        """Sample for the HTTP interface, part by part. Ending the iteration early aborts.

        Raises:
            RequestRefused: the engine does not take the request; before the first part.
            EngineDead: it died.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError

        await self._open.wait()
        sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
        try:
            params = self._sampling(GenerationRequest(prompt_ids, sampling, max_tokens, stop))
            params.output_kind = RequestOutputKind.DELTA
            async for output in self.llm.generate(self._prompt(prompt_ids), params, request_id):
                one = output.outputs[0]
                tokens = list(one.token_ids)
                logprobs = [step[token].logprob for step, token in zip(one.logprobs or [], tokens, strict=True)]
                yield Part(tokens, logprobs, one.finish_reason)
        except VLLMClientError as error:
            raise RequestRefused(str(error)) from error
        except EngineDeadError as error:
            raise EngineDead(f"replica {self.replica}: the engine died: {error}") from error

    async def abort(self, request_id: str) -> None:
        """End a running `generate`, which then returns what it has."""
        if request_id in self._gated:
            self._gated[request_id] = True
        else:
            await self.llm.abort(request_id)

    def _sampling(self, request: GenerationRequest) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        stop_ids, stop_strings = self._stops(request.stop)
        return SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.sampling.temperature,
            top_p=request.sampling.top_p,
            top_k=request.sampling.top_k,
            logprobs=0,
            stop_token_ids=stop_ids,
            stop=stop_strings,
            include_stop_str_in_output=True,
            detokenize=bool(stop_strings),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _stops(self, stop: tuple[str, ...]) -> tuple[list[int], list[str]]:
        """Split stop strings into single tokens and those that only detokenised text can show."""
        if stop not in self._stop_cache:
            ids, strings = [self._tokenizer.eos_token_id], []
            for text in stop:
                tokens = self._tokenizer.encode(text, add_special_tokens=False)
                if len(tokens) == 1:
                    ids.append(tokens[0])
                else:
                    strings.append(text)
            self._stop_cache[stop] = ([number for number in ids if number is not None], strings)
        return self._stop_cache[stop]

    async def swap_weights(self, update: dict[str, Any], version: int, lineage: int, clear_cache: bool) -> float:
        """Load a checked weight file under the running requests: pause and keep them, load, resume.

        Args:
            update: fields of `weight_transfer.MappedFileUpdate`.
            version: policy version of the new weights; tokens sampled from here on carry it.
            lineage: and its lineage.
            clear_cache: whether running requests' KV is computed again under the new weights.

        Returns:
            seconds for which generation stood still.

        Raises:
            EngineDead: the update failed after it had begun: the engine may be half loaded, and takes no request any
            more.
        """
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        llm = self.llm
        self._open.clear()
        started = time.monotonic()
        try:
            async with _deadline("the engine to swap its weights", self.config.rollout.engine_timeout_s):
                await llm.pause_generation(mode="keep", clear_cache=clear_cache)
                await llm.start_weight_update()
                await llm.update_weights(WeightTransferUpdateRequest(update_info=update))
                await llm.finish_weight_update(version_label(version, lineage))
                verified = await llm.collective_rpc("verify_weights", args=(update,))
                self.held = (version, lineage)
                await llm.resume_generation()
        except BaseException as error:
            self._broken = f"the update to version {version}.{lineage} failed: {error}"
            raise EngineDead(f"replica {self.replica}: {self._broken}") from error
        finally:
            self._open.set()
        for compared, left_out in verified:
            if left_out:
                log.warning("%d tensors were compared after the update; not compared: %s", compared, left_out[:8])
        return time.monotonic() - started

    async def check_health(self) -> None:
        """Tell a dead or hung engine from a busy one: a busy engine answers control messages between two steps.

        Raises:
            EngineDead: a process of the engine has ended, or it did not answer for ``rollout.engine_timeout_s``.
        """
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            async with _deadline("the engine's answer", self.config.rollout.engine_timeout_s):
                await self.llm.check_health()
                await self.llm.get_weight_version()
        except (EngineDeadError, DeadlineExceeded) as error:
            raise EngineDead(f"replica {self.replica}: {error}") from error

    async def died(self) -> None:
        """Return once a process of the engine has ended."""
        while self._llm is not None and not self._llm.errored:  # noqa: ASYNC110  vLLM tells by a flag only
            await asyncio.sleep(DEATH_POLL_S)

    def close(self) -> None:
        """End the engine's processes."""
        if self._llm is not None:
            from vllm import envs

            self._llm.shutdown(timeout=CLOSE_S)
            self._llm = None
            envs.disable_envs_cache()
            gc.unfreeze()
            gc.collect()  # its destructor fails when it is left to the interpreter's end


def _generation(output: CompletionOutput) -> Generation:
    token_ids = list(output.token_ids)
    steps = output.logprobs or []
    logprobs = [step[token].logprob for step, token in zip(steps, token_ids, strict=True)]
    spans = []
    for span in output.weight_versions or []:
        if span.end > span.start:
            spans.append(VersionSpan(*parse_label(span.version), span.start, span.end))
    if token_ids and (not spans or spans[0].start != 0 or spans[-1].end != len(token_ids)):
        raise EngineDead("the engine reported tokens without the policy version that sampled them")
    if output.finish_reason not in FINISHES:
        raise EngineDead(f"the engine ended a request with {output.finish_reason!r}")
    return Generation(token_ids, logprobs, spans, FINISHES[output.finish_reason])


class _deadline:
    """``asyncio.timeout`` whose error names what was waited for."""

    def __init__(self, waited_for: str, seconds: float) -> None:
        self._waited_for, self._seconds = waited_for, seconds
        self._timeout = asyncio.timeout(seconds)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        try:
            await self._timeout.__aexit__(*exc_info)
        except TimeoutError as error:
            raise DeadlineExceeded(self._waited_for, self._seconds) from error
