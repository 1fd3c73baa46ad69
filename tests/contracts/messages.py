"""One example of every message; the golden bytes are made from these."""

from __future__ import annotations

from singlestream.contracts import (
    EndOfRun,
    Lease,
    Message,
    PolicyVersion,
    PosteriorUpdate,
    Progress,
    Sampling,
    Segment,
    TensorEntry,
    Tombstone,
    ToolCall,
    Trajectory,
    WeightManifest,
)


def segments() -> list[Segment]:
    """A prompt, a turn, a tool's answer, and a second turn by a newer version."""
    return [
        Segment(kind="prompt", token_ids=[1, 2, 3]),
        Segment(kind="generated", token_ids=[8, 9], logprobs=[-0.5, -0.25], version=4, lineage=1, replica="r1"),
        Segment(kind="observation", token_ids=[6]),
        Segment(kind="generated", token_ids=[7], logprobs=[-2.0], version=5, lineage=1, replica="r2"),
    ]


def trajectory(**changes: object) -> Trajectory:
    fields = {
        "lease_id": "train:5f3a9c01:17",
        "prompt_id": "a1b2",
        "segments": segments(),
        "reward": 1.0,
        "v_hat": 0.4,
        "answer": "4277",
        "end_reason": "stop",
        "turns": 2,
        "tool_calls": [ToolCall(turn=0, status="ok", wall_s=0.5)],
        "attempts": 1,
        "started_at_s": 1.5,
        "finished_at_s": 2.5,
    }
    return Trajectory(**{**fields, **changes})


def lease(**changes: object) -> Lease:
    fields = {
        "lease_id": "train:5f3a9c01:17",
        "prompt_id": "a1b2",
        "question": "47*91=?",
        "answer": "4277",
        "source": "multiply",
        "environment": "tiny_tool",
        "v_hat": 0.4,
        "version": 4,
        "lineage": 1,
        "sampling": Sampling(temperature=1.0, top_p=1.0, top_k=0),
        "issued_at_s": 1.0,
    }
    return Lease(**{**fields, **changes})


EXAMPLES: dict[str, Message] = {
    "lease": lease(
        pinned=True, attempts=1, progress=Progress(segments=segments()[:2], turns=0, tool_calls=[], started_at_s=1.5)
    ),
    "trajectory": trajectory(),
    "tombstone": Tombstone(
        lease_id="train:5f3a9c01:18", prompt_id="a1b2", reason="attempts", detail="its holder went silent", attempts=3
    ),
    "end_of_run": EndOfRun(reason="stopped by request"),
    "posterior_update": PosteriorUpdate(
        lease_id="train:5f3a9c01:17", prompt_id="a1b2", outcome="trained", reward=1.0, version=5
    ),
    "policy_version": PolicyVersion(
        version=5,
        lineage=1,
        z=0.25,
        drift=0.015,
        manifest=WeightManifest(
            path="/dev/shm/singlestream-demo/5-1.weights",
            total_bytes=16,
            tensors=[
                TensorEntry(name="model.norm.weight", dtype="bfloat16", shape=[8], offset=0, nbytes=16, crc32=1234)
            ],
        ),
        published_at_s=3.0,
    ),
}
