"""Datasets to prompts: ``python -m services.rollout.datasets NAME [FILES…] --out prompts.jsonl``.

What differs between datasets is data, in `SCHEMAS`: where the question and the answer stand. Files are JSONL or
Parquet; without files the dataset is loaded from the Hugging Face hub, which needs the package ``datasets``. Tasks
that a package makes: ``reasoning_gym:GENERATOR:SIZE:SEED`` and ``verifiers:package.module:function``. The output is
what ``POST /v1/prompts`` takes, a prompt a line.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singlestream.errors import ConfigError


@dataclass(frozen=True)
class Schema:
    """Where a dataset keeps what is needed.

    Args:
        question: path to the question: keys and list positions, separated by dots.
        answer: path to the ground truth.
        hub: repository on the Hugging Face hub; None for files only.
        subset: configuration of that repository; None takes its only one.
        split: split of that repository.
        answer_after: text after the last occurrence of which the answer stands; None takes all of it.
        question_prefix: pattern that is removed from the beginning of the question: instructions of other recipes.
        question_suffix: likewise from its end.
    """

    question: str
    answer: str
    hub: str | None = None
    subset: str | None = None
    split: str = "train"
    answer_after: str | None = None
    question_prefix: str | None = None
    question_suffix: str | None = None


SCHEMAS: dict[str, Schema] = {
    "dapo_math_17k": Schema(
        "prompt.0.content",
        "reward_model.ground_truth",
        hub="BytedTsinghua-SIA/DAPO-Math-17k",
        question_prefix=r"Solve the following math problem step by step\. The last line of your response .*?\n\n",
        question_suffix=r"\n\nRemember to put your answer on its own line after \"Answer:\"\.",
    ),
    "math": Schema(
        "prompt.0.content",
        "reward_model.ground_truth",
        question_prefix=r"Let's think step by step and output the final answer within \\boxed\{\}\.\n\n",
    ),
    "gsm8k": Schema("question", "answer", hub="openai/gsm8k", subset="main", answer_after="####"),
    "aime_2024": Schema("problem", "answer", hub="HuggingFaceH4/aime_2024"),
    "aime_2025": Schema("problem", "answer", hub="MathArena/aime_2025"),
    "beyond_aime": Schema("problem", "answer", hub="ByteDance-Seed/BeyondAIME", split="test"),
    "brumo_2025": Schema("problem", "answer", hub="MathArena/brumo_2025"),
    "hmmt_feb_2025": Schema("problem", "answer", hub="MathArena/hmmt_feb_2025"),
    "math_500": Schema("problem", "answer", hub="HuggingFaceH4/MATH-500", split="test"),
    "polaris": Schema("problem", "answer", hub="POLARIS-Project/Polaris-Dataset-53K"),
    "question_answer": Schema("question", "answer"),
    "problem_answer": Schema("problem", "answer"),
}


def field(row: Mapping[str, Any], path: str) -> str:
    """The text at a path, empty where it is null or NaN. Raises KeyError, naming the path, where there is none."""
    value: Any = row
    for part in path.split("."):
        if value is None:
            return ""
        try:
            value = value[int(part)] if part.isdigit() else value[part]
        except (KeyError, IndexError, TypeError) as error:
            raise KeyError(f"no {path!r}; the row has {sorted(row)}") from error
    missing = value is None or value != value  # as Parquet and pandas write an absent value
    return "" if missing else str(value)


def to_prompt(row: Mapping[str, Any], schema: Schema) -> tuple[str, str]:
    """(question, answer) of a row.

    Raises:
        KeyError: it has no such field.
        ValueError: one of them is empty, or the mark is missing after which the answer stands.
    """
    question, answer = field(row, schema.question), field(row, schema.answer)
    if schema.answer_after is not None and answer:
        _, mark, answer = answer.rpartition(schema.answer_after)
        if not mark:
            raise ValueError(f"an answer without {schema.answer_after!r}")
    if schema.question_prefix is not None:
        question = re.sub(r"\A" + schema.question_prefix, "", question, flags=re.DOTALL)
    if schema.question_suffix is not None:
        question = re.sub(schema.question_suffix + r"\Z", "", question, flags=re.DOTALL)
    question, answer = question.strip(), answer.strip()
    if not question or not answer:
        raise ValueError(f"an empty {'question' if not question else 'answer'}")
    return question, answer


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL or Parquet file. Raises `ConfigError` for another one, or a damaged line."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
    elif path.suffix in (".jsonl", ".json"):
        with path.open() as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise ConfigError(f"{path}, line {number}: {error}") from error
    else:
        raise ConfigError(f"{path}: neither .jsonl nor .parquet")


def read_hub(schema: Schema) -> Iterator[dict[str, Any]]:
    """Rows from the Hugging Face hub. Raises `ConfigError` without the package ``datasets`` or without a repository."""
    if schema.hub is None:
        raise ConfigError("this dataset has no repository on the hub: name its files")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ConfigError("install the package datasets, or name the dataset's files") from error
    yield from load_dataset(schema.hub, schema.subset, split=schema.split)


def prompts(
    rows: Iterable[Mapping[str, Any]], schema: Schema, source: str, left_out: list[str]
) -> Iterator[dict[str, str]]:
    """Questions and answers, each question once: a posterior belongs to a prompt.

    Args:
        rows: of the data set.
        schema: where they keep what is needed.
        source: the data set's name.
        left_out: gets a line for each row that has no question or no answer in its fields: published sets have some.

    Raises:
        ConfigError: a row has no such field; names its number.
    """
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        try:
            question, answer = to_prompt(row, schema)
        except KeyError as error:
            raise ConfigError(f"{source}, row {number}: {error}") from error
        except ValueError as error:
            left_out.append(f"{source}, row {number}: {error}")
            continue
        if question not in seen:
            seen.add(question)
            yield {"question": question, "answer": answer, "source": source}


def _reasoning_gym(arguments: str) -> Iterator[dict[str, str]]:
    from services.rollout.environments.reasoning_gym import entries

    try:
        generator, size, seed = arguments.split(":")
        yield from entries(generator, int(size), int(seed))
    except ValueError as error:
        raise ConfigError(f"reasoning_gym:{arguments}: {error}") from error


def _verifiers(path: str) -> Iterator[dict[str, str]]:
    from services.rollout.verifiers_tasks import entries

    try:
        yield from entries(path)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"verifiers:{path}: {error}") from error


MAKERS = {"reasoning_gym": _reasoning_gym, "verifiers": _verifiers}
"""Name before the first colon → prompts of what stands after it; they bring their own environment."""


def read(name: str, files: Sequence[Path], environment: str, left_out: list[str]) -> Iterator[dict[str, str]]:
    """Prompts of a data set, or of tasks that a package makes. Raises `ConfigError` for a bad name or row."""
    kind, _, arguments = name.partition(":")
    if kind in MAKERS:
        yield from MAKERS[kind](arguments)
        return
    if name not in SCHEMAS:
        raise ConfigError(f"{name!r} is none of {', '.join(sorted(SCHEMAS))}, {':…, '.join(MAKERS)}:…")
    schema = SCHEMAS[name]
    rows = (row for path in files for row in read_file(path)) if files else read_hub(schema)
    for prompt in prompts(rows, schema, name, left_out):
        yield prompt | {"environment": environment}


def main(argv: list[str] | None = None) -> int:
    """Write a dataset's prompts; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.rollout.datasets", description=__doc__)
    parser.add_argument("name", help=", ".join([*sorted(SCHEMAS), *(f"{kind}:…" for kind in MAKERS)]))
    parser.add_argument("files", nargs="*", type=Path, help="JSONL or Parquet; none: from the Hugging Face hub")
    parser.add_argument("--out", type=Path, required=True, help="JSONL to write")
    parser.add_argument("--environment", default="math_python", help="environment, optionally with /grader")
    parser.add_argument("--split", default="train", choices=("train", "eval"), help="what the prompts are for")
    options = parser.parse_args(argv)
    count, left_out = 0, list[str]()
    try:
        with options.out.open("w") as file:
            for prompt in read(options.name, options.files, options.environment, left_out):
                file.write(json.dumps(prompt | {"split": options.split}) + "\n")
                count += 1
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if left_out:
        print(f"{len(left_out)} rows left out, the first: {left_out[0]}", file=sys.stderr)
    if not count:
        print(f"error: {options.name} has no prompts", file=sys.stderr)
        return 2
    print(f"{count} prompts in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
