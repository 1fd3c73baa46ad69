"""Models that the learner would score wrongly are refused by name; the others score as they themselves do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedConfig

from services.learner import architectures, attention
from services.learner.model import Scorer, load_policy
from singlestream.config import LearnerConfig
from singlestream.errors import ConfigError

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
ATTENTION = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 48}
CONFIGS: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3": lambda: transformers.Qwen3Config(**ATTENTION, head_dim=8),
    "qwen3 with windows": lambda: transformers.Qwen3Config(
        **ATTENTION, head_dim=8, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3_next": lambda: transformers.Qwen3NextConfig(
        **ATTENTION, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, layer_types=["linear_attention", "full_attention"],
    ),
    "lfm2": lambda: transformers.Lfm2Config(**ATTENTION, layer_types=["conv", "full_attention"]),
    "mamba": lambda: transformers.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8),
    "mistral": lambda: transformers.MistralConfig(**ATTENTION, head_dim=8, sliding_window=4),
    "gemma2": lambda: transformers.Gemma2Config(**ATTENTION, head_dim=8, final_logit_softcapping=None),
    "gpt_oss": lambda: transformers.GptOssConfig(**ATTENTION, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
    "stablelm": lambda: transformers.StableLmConfig(**ATTENTION),
    "opt": lambda: transformers.OPTConfig(**SIZES, word_embed_proj_dim=32, ffn_dim=48, dropout=0.5),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4),
}  # fmt: skip
PACKED = {"qwen3", "opt", "gpt2"}
ROWS = [torch.arange(3, 3 + length) % 64 for length in (13, 1, 9, 17)]


def whole(config: PreTrainedConfig, training: bool = False) -> tuple[Any, str]:
    """A random model as `load_policy` builds it, and why it cannot be packed."""
    torch.manual_seed(0)
    architectures.remove_dropout(config)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    why = architectures.not_plain(config.get_text_config(), kind)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=None if why else attention.NAME)
    for parameter in lm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return lm.train(training), why


def scores(lm: Any, packed: bool) -> torch.Tensor:
    """Log-probs of every token but each trajectory's first, all trajectories in one micro-batch."""
    lengths = [len(row) for row in ROWS]
    positions = rows = None
    if packed:
        width, tokens = None, torch.cat(ROWS)[None]
        positions = torch.cat([torch.arange(length) for length in lengths])[None]
        rows, starts = attention.rows_of(lengths, torch.device("cpu")), [sum(lengths[:i]) for i in range(len(lengths))]
    else:
        width = max(lengths)
        tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in ROWS])
        starts = [width * i for i in range(len(lengths))]
    before = torch.cat([start + torch.arange(length - 1) for start, length in zip(starts, lengths, strict=True)])
    with torch.no_grad():
        return Scorer(lm, 1.0, 64)(tokens, positions, before, torch.cat([row[1:] for row in ROWS]), rows)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_is_scored_as_it_scores_itself_or_is_not_packed(name: str) -> None:
    lm, why = whole(CONFIGS[name]())
    assert (why == "") is (name in PACKED), why
    with torch.no_grad():
        logprobs = [lm(row[None], use_cache=False).logits[0].log_softmax(-1)[:-1] for row in ROWS]
    alone = torch.cat([of.gather(1, row[1:, None])[:, 0] for of, row in zip(logprobs, ROWS, strict=True)])
    for packed in (False, True) if name in PACKED else (False,):
        torch.testing.assert_close(scores(lm, packed), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["opt", "gpt2"])
def test_training_mode_scores_alike_from_pass_to_pass(name: str) -> None:
    """It is what recomputed activations need; the configurations ask for dropout."""
    config = CONFIGS[name]()
    assert any(value for key, value in config.to_dict().items() if "drop" in key)
    lm, _ = whole(config, training=True)
    once = scores(lm, packed=True)
    assert torch.equal(once, scores(lm, packed=True))
    torch.testing.assert_close(once, scores(lm.eval(), packed=True))


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (CONFIGS["qwen3_next"](), r'layers of linear_attention, so .* set learner.attention = "padded"'),
        (CONFIGS["lfm2"](), "layers of conv"),
        (CONFIGS["mistral"](), "sliding_window narrows its attention"),
        (CONFIGS["stablelm"](), "StableLmForCausalLM computes its attention itself"),
        (transformers.PhiConfig(**ATTENTION), "its output embedding has a bias"),
        (transformers.Gemma2Config(**ATTENTION), "final_logit_softcapping = 30.0"),
        (transformers.FalconH1Config(**ATTENTION, lm_head_multiplier=0.5), "lm_head_multiplier = 0.5"),
        (transformers.T5Config(), "t5 is no causal language model"),
    ],
    ids=lambda value: getattr(value, "model_type", "why"),
)
def test_what_would_be_scored_wrongly_is_refused_before_any_weight_is_read(
    config: PreTrainedConfig, cause: str, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)
    nowhere: Any = None
    with pytest.raises(ConfigError, match=cause):
        load_policy(tmp_path, LearnerConfig(), 1.0, nowhere, nowhere)
