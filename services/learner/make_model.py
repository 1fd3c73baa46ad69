"""Make a small model and its prompts: ``python -m services.learner.make_model {tiny,smollm2} OUT``.

The folder appears complete or not at all, and a second call with the same recipe and seed does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

from singlestream.errors import ConfigError

RECIPES = {"tiny": 1, "smollm2": 2}
"""Name of each model and the number of its recipe: a folder made by another number is not taken for this one."""

MARKER = "recipe.json"
PROMPTS = "prompts.jsonl"


def write_prompts(folder: Path, rows: list[dict[str, str]]) -> None:
    """Write prompts beside the weights, one a line: question, answer, source, environment, split (train, eval)."""
    (folder / PROMPTS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def make(name: str, out: Path, seed: int) -> bool:
    """Make a model's folder.

    Args:
        name: a key of `RECIPES`.
        out: the folder to make.
        seed: of the weights, the demonstrations and the split.

    Returns:
        False where the folder was already there, made by the same recipe and seed.

    Raises:
        ConfigError: the folder exists and is something else.
    """
    recipe = {"name": name, "recipe": RECIPES[name], "seed": seed}
    if out.exists():
        marker = out / MARKER
        if marker.is_file() and json.loads(marker.read_text()) == recipe:
            return False
        raise ConfigError(
            f"{out} exists and is not what this recipe makes ({recipe}): remove it or name another folder"
        )
    beside = out.parent / f".{out.name}.{os.getpid()}"
    beside.mkdir(parents=True)
    try:
        if name == "tiny":
            from services.learner.tiny_model import make_tiny

            make_tiny(beside, seed)
        else:
            from services.learner.smollm2_model import make_smollm2

            make_smollm2(beside, seed)
        (beside / MARKER).write_text(json.dumps(recipe))
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return True


def main(argv: list[str] | None = None) -> int:
    """Parse the command line and make the model."""
    parser = argparse.ArgumentParser(prog="python -m services.learner.make_model", description=__doc__)
    parser.add_argument("name", choices=sorted(RECIPES), help="tiny: a Qwen3 of 0.44 M parameters; smollm2: 135 M")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--seed", type=int, default=3, help="of weights, demonstrations and split (default 3)")
    options = parser.parse_args(argv)
    try:
        made = make(options.name, options.out, options.seed)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{options.out}: {'made' if made else 'already there'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
