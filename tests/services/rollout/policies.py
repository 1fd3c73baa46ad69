"""Small random policies, their published files, and what transformers says of their log-probabilities."""

from __future__ import annotations

import copy
import time
import zlib
from pathlib import Path

import torch
from redis.asyncio import Redis
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from singlestream.contracts import PolicyVersion, TensorEntry, WeightManifest
from singlestream.streams import Keys, LearnerStreams

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = ("<code>", "</code>", "<interpreter>", "</interpreter>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def character_tokenizer(*, ends: bool = True) -> PreTrainedTokenizerFast:
    """One token a character, and the tags; ``ends=False`` has no end of sequence: a generation is as long as it may."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *TAGS, "\n", *map(chr, range(32, 127))))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    eos = "<|im_end|>" if ends else None
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token="<|endoftext|>")
    fast.chat_template = TEMPLATE
    return fast


def random_policy(seed: int, *, tied: bool = True, scale: float = 3.0, eos: int | None = 2) -> Qwen3ForCausalLM:
    """A two-layer Qwen3 with enlarged random weights, so that two seeds disagree about almost every token."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(scale)
            parameter.copy_(parameter.bfloat16().float())  # the published bytes are exact
    return model


def opposed(model: Qwen3ForCausalLM) -> Qwen3ForCausalLM:
    """The same policy with its feed-forward layers' sign turned, and that of its logits, which are doubled: a small
    delta, and no token is as likely as it was."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("down_proj.weight"):
                parameter.neg_()
        other.model.norm.weight.mul_(-2)
    return other


def tensors_of(model: Qwen3ForCausalLM) -> dict[str, torch.Tensor]:
    """What is published of a policy: a tied output layer goes with the embedding."""
    tied = model.config.tie_word_embeddings
    return {name: one for name, one in model.state_dict().items() if not (tied and name == "lm_head.weight")}


def save_policy(model: Qwen3ForCausalLM, folder: Path, *, ends: bool = True) -> Path:
    model.save_pretrained(folder)
    character_tokenizer(ends=ends).save_pretrained(folder)
    return folder


def write_weights(model: Qwen3ForCausalLM, path: Path, dtype: torch.dtype = torch.float32) -> WeightManifest:
    """Pack a policy into one file, as the learner does, and describe it."""
    entries, offset = [], 0
    beside = path.with_suffix(".part")
    with beside.open("wb") as file:
        for name, tensor in tensors_of(model).items():
            data = tensor.to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
            entry = TensorEntry(
                name=name,
                dtype=str(dtype).removeprefix("torch."),
                shape=list(tensor.shape),
                offset=offset,
                nbytes=len(data),
                crc32=zlib.crc32(data),
            )
            entries.append(entry)
            file.write(data)
            offset += len(data)
    beside.rename(path)
    return WeightManifest(path=str(path), total_bytes=offset, tensors=entries)


async def publish(redis: Redis, keys: Keys, manifest: WeightManifest, version: int, lineage: int = 1) -> None:
    """Announce a version as a learner would."""
    learner = LearnerStreams(redis, keys)
    await redis.set(keys.fence("learner"), learner.token)
    await learner.publish(
        PolicyVersion(
            version=version, lineage=lineage, z=float(version), drift=0.0, manifest=manifest, published_at_s=time.time()
        )
    )


def reference_logprobs(
    before: Qwen3ForCausalLM, after: Qwen3ForCausalLM, token_ids: list[int], prompt_tokens: int, switch: int
) -> torch.Tensor:
    """[T] log-probabilities of the tokens after the prompt: the first ``switch`` by one policy, the rest by the other.

    The second reads the keys and values that the first left behind, as an engine does that keeps its cache: it begins
    with the first one's last token. With ``switch`` = 0 it does everything.
    """
    ids = torch.tensor([token_ids])
    before = before if switch else after
    kept = prompt_tokens + max(0, switch - 1)
    with torch.no_grad():
        first = before(input_ids=ids[:, :kept], use_cache=True)
        second = after(input_ids=ids[:, kept:-1], past_key_values=first.past_key_values, use_cache=True)
    logits = torch.cat([first.logits, second.logits], 1)[0, prompt_tokens - 1 :].float()
    targets = torch.tensor(token_ids[prompt_tokens:])
    return torch.log_softmax(logits, -1).gather(-1, targets[:, None])[:, 0]
