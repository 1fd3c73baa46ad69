"""A Qwen3 of 0.44 M parameters over characters: it writes products, and sometimes asks the Python tool for them.

The warm start shows 40 % tool calls and 60 % guesses, so the policy starts between 0 and 1: what is left for
reinforcement learning is to find out that the tool pays. It is a toy, and says so wherever it is shown.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from services.learner.make_model import write_prompts

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<code>", "</code>", "<interpreter>", "</interpreter>")
"""Single tokens that stay visible when decoded: the agent loop and the grader read them."""

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant\n{% endif -%}"
)

TRAIN_PROMPTS, EVAL_PROMPTS = 1024, 512
STEPS, BATCH, LR, WARMUP_STEPS = 250, 64, 2e-3, 50
TOOL_SHARE = 0.4
"""Share of demonstrations that call the tool; with 15 % the same training reaches .605 instead of .893."""
IGNORE = -100

Piece = tuple[str, bool]
"""Text and whether it is learned (what the tool says is not)."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character (newline and printable ASCII), three special tokens and the four tags: 103 in all."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *TAGS, *characters))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[0],
        padding_side="left",
        model_max_length=512,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(tokenizer: PreTrainedTokenizerFast, layers: int = 2) -> Qwen3Config:
    """Architecture of the tiny model; the vocabulary is padded to 128 rows."""
    return Qwen3Config(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def split_products(seed: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """All products of two numbers of 11 to 99, shuffled: (what may be trained on, the 512 held out)."""
    pairs = [(a, b) for a in range(11, 100) for b in range(11, 100)]
    random.Random(seed).shuffle(pairs)  # noqa: S311  a split, no secret
    return pairs[EVAL_PROMPTS:], pairs[:EVAL_PROMPTS]


def demonstration(a: int, b: int, with_tool: bool) -> list[Piece]:
    """What the model should write for ``a*b=?``; only pieces marked True are learned."""
    answer: list[Piece] = [(f"\\boxed{{{a * b}}}<|im_end|>", True)]
    if not with_tool:
        return answer
    return [(f"<code>print({a}*{b})</code>", True), (f"<interpreter>{a * b}</interpreter>", False), *answer]


def _row(tokenizer: PreTrainedTokenizerFast, a: int, b: int, with_tool: bool) -> tuple[list[int], list[int]]:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{a}*{b}=?"}], tokenize=False, add_generation_prompt=True
    )
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    labels = [IGNORE] * len(ids)
    for piece, learned in demonstration(a, b, with_tool):
        tokens = tokenizer(piece, add_special_tokens=False).input_ids
        ids += tokens
        labels += tokens if learned else [IGNORE] * len(tokens)
    return ids, labels


def _batch(rows: list[tuple[list[int], list[int]]], pad: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Right-padded (ids, labels, attention mask), each [batch, longest row]."""
    width = max(len(ids) for ids, _ in rows)
    ids_BT = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    labels_BT = torch.tensor([labels + [IGNORE] * (width - len(labels)) for _, labels in rows])
    mask_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    return ids_BT, labels_BT, mask_BT


def warm_start(model: Any, tokenizer: PreTrainedTokenizerFast, pairs: list[tuple[int, int]], seed: int) -> float:
    """Fit the demonstrations in place; returns the last step's mean loss in nats a token."""
    chance = random.Random(seed + 1)  # noqa: S311  demonstrations, no secret
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    model.train()
    loss = torch.zeros(())
    for step in range(1, STEPS + 1):
        rate = LR * min(1.0, step / WARMUP_STEPS) * (1.0 - 0.9 * step / STEPS)
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = [_row(tokenizer, *chance.choice(pairs), chance.random() < TOOL_SHARE) for _ in range(BATCH)]
        ids_BT, labels_BT, mask_BT = _batch(rows, tokenizer.pad_token_id)
        logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT).logits[:, :-1]
        loss = cross_entropy(logits_BTV.flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"warm start: step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)
    return float(loss.item())


def make_tiny(folder: Path, seed: int) -> None:
    """Write the warm-started model, its tokenizer and its prompts into ``folder``."""
    torch.manual_seed(seed)
    started = time.monotonic()
    tokenizer = make_tokenizer()
    model = Qwen3ForCausalLM(tiny_config(tokenizer))
    train, held_out = split_products(seed)
    warm_start(model, tokenizer, train, seed)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [
        {
            "question": f"{a}*{b}=?",
            "answer": str(a * b),
            "source": "tiny_products",
            "environment": "tiny_tool",
            "split": split,
        }
        for split, pairs in (("train", train[:TRAIN_PROMPTS]), ("eval", held_out))
        for a, b in pairs
    ]
    write_prompts(folder, rows)
    print(f"warm start: {STEPS} steps in {time.monotonic() - started:.0f} s", flush=True)
