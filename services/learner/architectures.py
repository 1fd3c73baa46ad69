"""Which models of transformers the learner scores rightly, and why it refuses the others.

Its score is the output embedding applied to the last hidden state, over the temperature. Whatever a model does beside
that would be left out in silence, so each of these is looked for before a run begins.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from singlestream.errors import ConfigError

LOGIT_CHANGES = (
    "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap", "logits_scaling", "logit_scale",
    "lm_head_multiplier", "logits_mup_width_multiplier",
)  # fmt: skip
"""Settings by which models scale or cap their logits; None and 1 change nothing."""
WINDOWS = ("sliding_window", "attention_window_size", "attention_chunk_size")
"""Settings that narrow the attention of every layer, where a model does not say what each layer is."""
FULL = "full_attention"
"""Of ``layer_types``: attention to everything before."""


def refuse_changed_logits(config: Any) -> None:
    """Raise `ConfigError` where a model scales or caps its logits. ``config`` is its text configuration."""
    for name in LOGIT_CHANGES:
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ConfigError(f"run.model: {name} = {getattr(config, name)}: the learner scores plain logits only")


def refuse_biased_head(lm: nn.Module) -> None:
    """Raise `ConfigError` where the output embedding has a bias (Phi-1 and 2, GPT-J, CodeGen, BERT's family)."""
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise ConfigError("run.model: its output embedding has a bias, which the learner does not compute")


def remove_dropout(config: Any) -> None:
    """Set every dropout of a configuration to 0: the engine samples without, and scores must not change by chance.

    Recomputed activations need training mode, in which a model would drop out.
    """
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if "drop" in name and isinstance(value, float):
                setattr(part, name, 0.0)


def not_plain(config: Any, kind: type[Any]) -> str:
    """Why a model's layers are not all plain causal attention behind transformers' interface; empty where they are.

    Only those can be packed: `attention.attend` keeps them inside each trajectory. State that a recurrent or
    convolutional layer carries along a row would leak from one trajectory into the next, and not every model gives its
    own masks the positions that say where one begins.

    Args:
        config: the model's text configuration.
        kind: its class.
    """
    layers = getattr(config, "layer_types", None)
    if others := sorted(set(layers or ()) - {FULL}):
        return f"it has layers of {', '.join(others)}"
    narrow = [name for name in WINDOWS if layers is None and getattr(config, name, None)]
    if narrow:
        return f"{narrow[0]} narrows its attention"
    if getattr(config, "attn_logit_softcapping", None):
        return "attn_logit_softcapping caps its attention"
    if not getattr(config, "num_attention_heads", None):
        return "it has no attention"
    return "" if kind._supports_attention_backend else f"{kind.__name__} computes its attention itself"
