from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from services.learner import tiny_model
from services.learner.make_model import main, make
from services.learner.smollm2_model import WORKED_EXAMPLE, larger_number_prompts, with_worked_example
from singlestream.errors import ConfigError


def test_the_tiny_model_and_its_prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny_model, "STEPS", 2)
    out = tmp_path / "models" / "tiny"
    assert make("tiny", out, seed=3)
    assert [path.name for path in out.parent.iterdir()] == ["tiny"], "nothing is left beside it"
    assert not make("tiny", out, seed=3), "made once"
    with pytest.raises(ConfigError, match="remove it"):
        make("tiny", out, seed=4)

    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    questions = {split: {row["question"] for row in rows if row["split"] == split} for split in ("train", "eval")}
    assert (len(questions["train"]), len(questions["eval"])) == (1024, 512)
    assert not questions["train"] & questions["eval"]
    left, right = rows[0]["question"].removesuffix("=?").split("*")
    assert rows[0]["answer"] == str(int(left) * int(right))
    assert {row["environment"] for row in rows} == {"tiny_tool"}

    tokenizer = AutoTokenizer.from_pretrained(out)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1*2=?"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\n1*2=?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokenizer("<code>print(1)</code>").input_ids) == "<code>print(1)</code>"
    assert AutoModelForCausalLM.from_pretrained(out).num_parameters() == 443_136


def test_the_warm_start_never_sees_what_is_held_out() -> None:
    train, held_out = tiny_model.split_products(3)
    assert (len(train), len(held_out)) == (89 * 89 - 512, 512)
    assert not set(train) & set(held_out)
    assert tiny_model.split_products(3) == (train, held_out)


def test_a_folder_that_is_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    assert main(["tiny", str(tmp_path / "mine")]) == 2
    assert "exists and is not what this recipe makes" in capsys.readouterr().err


def test_larger_number_prompts_are_split_and_right() -> None:
    rows = larger_number_prompts(3)
    questions = [row["question"] for row in rows]
    assert len(set(questions)) == len(rows) == 256 + 256
    assert sum(row["split"] == "eval" for row in rows) == 256
    assert all(row["answer"] in row["question"] and row["environment"] == "single_turn/exact" for row in rows)


def test_the_worked_example_needs_the_template_it_knows() -> None:
    template = "{{ 'a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    assert WORKED_EXAMPLE in with_worked_example(template)
    with pytest.raises(ConfigError, match="not the one expected"):
        with_worked_example("{{ messages }}")
