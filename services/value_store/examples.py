"""An example of every body, for the OpenAPI document: one run of two-digit products, told throughout."""

from __future__ import annotations

from typing import Any

PROMPT_ID, LEASE_ID, AT_S = "fd050b7395755f9d", "train:5f3a9c01:17", 1_790_000_000.0

NEW_PROMPT = {
    "question": "47*91=?",
    "answer": "4277",
    "source": "multiply",
    "environment": "math_python",
    "split": "train",
    "prior_rewards": [1.0, 0.0, 1.0],
}
VALUE = {
    "prompt_id": PROMPT_ID,
    "alpha": 3.28,
    "beta": 2.72,
    "v_hat": 0.547,
    "weight": 0.548,
    "n_eff": 5.8,
    "visits": 9,
    "interval": [0.18, 0.89],
    "version": 40,
    "updated_at_s": AT_S,
    "in_flight": False,
    "source": "multiply",
    "split": "train",
}
PROMPT_VALUE = {**VALUE, "question": "47*91=?", "answer": "4277", "environment": "math_python"}
UPDATE = {
    "lease_id": LEASE_ID,
    "outcome": "trained",
    "version": 40,
    "reward": 1.0,
    "rho": 0.95,
    "v_hat_before": 0.5,
    "v_hat_after": 0.547,
    "n_eff": 6.0,
    "interval": [0.19, 0.88],
    "z": 2.31,
    "v_hat_at_lease": 0.5,
    "at_s": AT_S,
}
TRAJECTORY = {
    "lease_id": LEASE_ID,
    "reward": 1.0,
    "v_hat": 0.5,
    "version": 40,
    "end_reason": "answered",
    "turns": 2,
    "attempts": 1,
    "finished_at_s": AT_S,
    "tool_calls": [{"turn": 1, "status": "ok", "wall_s": 0.04}],
    "segments": [
        {"kind": "prompt", "version": None, "tokens": 61, "text": "47*91=?"},
        {"kind": "generated", "version": 40, "tokens": 12, "text": "<code>print(47*91)</code>"},
        {"kind": "observation", "version": None, "tokens": 9, "text": "<interpreter>4277</interpreter>"},
    ],
}
SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}
JOB_ID = "0123456789ab"
JOB = {
    "job_id": JOB_ID,
    "purpose": "evaluate",
    "state": "running",
    "error": None,
    "waiting_for": None,
    "pinned": True,
    "version": 40,
    "lineage": 1,
    "n": 4,
    "prompts": 64,
    "total": 256,
    "done": 100,
    "failed": 0,
    "outstanding": 48,
    "reward_mean": 0.61,
    "tool_calls_mean": 0.8,
    "response_tokens_mean": 212.5,
    "versions": {"40": 100},
    "sampling": SAMPLING,
    "created_at_s": AT_S,
    "finished_at_s": None,
}
RESULT = {
    "prompt_id": PROMPT_ID,
    "repetition": 0,
    "lease_id": "evaluate:5f3a9c01:17",
    "reward": 1.0,
    "version": 40,
    "turns": 2,
    "tool_calls": 1,
    "action_tokens": 12,
    "response_tokens": 21,
    "answer": "4277",
    "end_reason": "answered",
    "failures": 0,
}
TRAINING = {"state": "running", "waiting_for": None, "trained": 640, "total": 6400, "outstanding": 40, "headroom": 8}
NO_LEASES = dict.fromkeys(("leased", "outstanding", "trained", "stale", "failed", "scored", "cancelled"), 0)
TRAINED = {**NO_LEASES, "leased": 700, "outstanding": 40, "trained": 640, "stale": 12, "failed": 8}
VERSION = {"version": 40, "lineage": 1, "z": 2.31, "drift": 0.0041, "published_at_s": AT_S}
REPLICA = {"name": "node-1:0", "slots": 64, "in_use": 60, "version": 40, "lineage": 1, "at_s": AT_S, "alive": True}
BAR = {"low": 0.5, "high": 0.55, "count": 118}

EXAMPLES: dict[str, dict[str, Any]] = {
    "Health": {"status": "ok", "epoch": "5f3a9c01", "run": "multiply"},
    "PromptIn": NEW_PROMPT,
    "Ids": {"ids": [PROMPT_ID]},
    "Page": {"prompts": [PROMPT_VALUE], "cursor": None},
    "PromptValue": PROMPT_VALUE,
    "History": {"prompt_id": PROMPT_ID, "entries": [UPDATE]},
    "Trajectories": {"prompt_id": PROMPT_ID, "trajectories": [TRAJECTORY]},
    "ValuesQuery": {"texts": ["47*91=?"], "source": "multiply"},
    "Values": {"values": [VALUE, None]},
    "Imported": {"prompts": 1000, "priors": 400, "unknown": 0},
    "JobIn": {"purpose": "evaluate", "split": "eval", "n": 4, "sampling": SAMPLING, "pinned": True},
    "Job": JOB,
    "Jobs": {"jobs": [JOB], "cursor": None},
    "TrainingIn": {"state": "running"},
    "Training": TRAINING,
    "Ledger": {
        "train": {**TRAINED, "adds_up": True},
        "estimate": {**NO_LEASES, "leased": 512, "scored": 512, "adds_up": True},
        "evaluate": {**NO_LEASES, "adds_up": True},
        "duplicates": 0,
        "epoch": "5f3a9c01",
    },
    "Policy": {"newest": VERSION, "z_now": 2.31, "versions": [VERSION]},
    "Preview": {"prompts": [VALUE]},
    "Stats": {
        "prompts": 1064,
        "prompts_train": 1000,
        "visited": 480,
        "visits": 652,
        "v_hat_mean": 0.52,
        "v_hat_histogram": [BAR],
        "n_eff_histogram": [{"low": 4.0, "high": 8.0, "count": 480}],
        "sampling_entropy_nats": 6.88,
        "sampling_entropy_max_nats": 6.91,
        "brier": 0.21,
        "reliability": [{"v_hat_low": 0.5, "v_hat_high": 0.6, "count": 90, "v_hat_mean": 0.55, "reward_mean": 0.57}],
        "replicas": [REPLICA],
    },
    "Overview": {
        "run": "multiply",
        "now_s": AT_S,
        "store_waiting_for": None,
        "training": TRAINING,
        "leases": {"train": TRAINED, "estimate": NO_LEASES, "evaluate": NO_LEASES},
        "reward_mean": 0.55,
        "staleness_mean": 0.8,
        "policy": VERSION,
        "z_now": 2.31,
        "queues": {
            "unread_leases": 8,
            "held_leases": 32,
            "trajectories": 64,
            "posterior_updates": 0,
            "results": 0,
            "dead_letters": 0,
            "read_at_s": AT_S,
        },
        "learner": {"step": 40, "state": "waiting", "waiting_for": "trajectories", "at_s": AT_S, "alive": True},
        "replicas": [REPLICA],
        "prompts": 1064,
        "visits": 652,
        "v_hat_over_time": [{"at_s": AT_S, "counts": [0] * 19 + [1064]}],
    },
}
"""Schema of a body → an example of it."""

DETAILS = {
    400: "the body is not JSON",
    401: "a valid bearer token is needed",
    403: "a valid bearer token is needed",
    404: f"no prompt {PROMPT_ID}",
    409: "training is stopped; that cannot be taken back",
    413: "the body is larger than the bound of 67108864 bytes",
    422: "5000 prompts a page in one request; the bound is 1000",
    429: "more than 2000 requests a second from 10.0.0.7",
    503: "the value store waits for Redis, for its first answer",
}
"""Status → what an error of it says."""
