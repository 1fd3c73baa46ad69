"""Every query of the dashboards and alert rules names a metric that a service exports."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog import encoder, plugins
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client import generate_latest
from redis.asyncio import Redis

from services.learner.metrics import Metrics as LearnerMetrics
from services.rollout.metrics import Metrics as RolloutMetrics
from services.sandbox_gateway.metrics import Metrics as SandboxMetrics
from services.value_store.loops import check_redis
from services.value_store.metrics import render
from services.value_store.store import Store
from singlestream.streams import Keys
from tests.deploy.conftest import DEPLOY, ROOT
from tests.services.value_store.world import World, make_config, make_prompts, settle, wake

DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = DEPLOY / "prometheus" / "rules.yml"
OUTSTANDING = 'singlestream_value_store_outstanding_leases{purpose="train"}'

HEALTHY: dict[str, str | None] = {
    'up{job="learner"}': "1x30",
    'up{job="rollout"}': "1x30",
    "singlestream_value_store_finished": "0x30",
    "singlestream_value_store_replicas": "2x30",
    "singlestream_value_store_ready": "1x30",
    "singlestream_sandbox_ready": "1x30",
    "singlestream_learner_step": "0+1x30",
    OUTSTANDING: "3x30",
    "singlestream_learner_skipped_steps_total": "2x30",
    "singlestream_learner_logprob_shift_mean_nats": "0.01x30",
    "singlestream_learner_effective_sample_size_ratio": "0.95x30",
    "singlestream_learner_idle_ratio": "0.1x30",
    "singlestream_rollout_failed_total": "3x30",
    "singlestream_rollout_episodes_total": "0+10x30",
    'singlestream_rollout_weight_updates_total{outcome="loaded"}': "0+1x30",
    'singlestream_rollout_weight_updates_total{outcome="refused"}': "0x30",
    "singlestream_rollout_tool_faults_total": "1x30",
    "singlestream_rollout_tool_calls_total": "0+10x30",
    "singlestream_sandbox_used_slots": "4x30",
    "singlestream_sandbox_slots": "4x30",
    "singlestream_sandbox_queued": "0x30",
    "singlestream_value_store_rho_clip_ratio": "0.3x30",
    "singlestream_value_store_brier": "0.2x30",
    'singlestream_value_store_stream_entries{stream="dead_letters"}': "10x30",
    'singlestream_value_store_dropped_total{what="dead_letters"}': "0x30",
    'singlestream_value_store_dropped_total{what="jobs"}': "0+1x30",
    'singlestream_value_store_stream_oldest_seconds{stream="posterior_updates"}': "0.5x30",
    'singlestream_value_store_stream_oldest_seconds{stream="trajectories"}': "0+300x30",
    'singlestream_value_store_stream_oldest_seconds{stream="leases"}': "900x30",
}
"""Series of a run that does well, every five minutes."""
BROKEN: list[tuple[str, dict[str, str | None]]] = [
    ("ServiceDown", {'up{job="learner"}': "0x30"}),
    ("ServiceDown", {'up{job="rollout"}': "0x30", "singlestream_value_store_finished": "1x30"}),
    ("", {'up{job="learner"}': "0x30", "singlestream_value_store_finished": "1x30"}),
    ("NoReplica", {"singlestream_value_store_replicas": "0x30"}),
    ("ValueStoreNotReady", {"singlestream_value_store_ready": "0x30"}),
    ("SandboxNotReady", {"singlestream_sandbox_ready": "0x30"}),
    ("TrainingStalled", {"singlestream_learner_step": "7x30"}),
    # Its first step is due, or the first one after a pause, and it has had 20 minutes.
    ("", {"singlestream_learner_step": "_x26 0x4", OUTSTANDING: "_x26 3x4"}),
    ("", {"singlestream_learner_step": "7x30", OUTSTANDING: "0x26 3x4"}),
    ("StepSkipped", {"singlestream_learner_skipped_steps_total": "0+1x30"}),
    ("EngineAndLearnerDisagree", {"singlestream_learner_logprob_shift_mean_nats": "0.2x30"}),
    ("EffectiveSampleSizeLow", {"singlestream_learner_effective_sample_size_ratio": "0.4x30"}),
    ("LearnerIdle", {"singlestream_learner_idle_ratio": "0.8x30"}),
    ("LeasesFail", {"singlestream_rollout_failed_total": "0+1x30"}),
    # Every one from the first on: what they are compared with does not exist.
    ("LeasesFail", {"singlestream_rollout_failed_total": "0+1x30", "singlestream_rollout_episodes_total": None}),
    ("WeightUpdatesFail", {'singlestream_rollout_weight_updates_total{outcome="refused"}': "0+1x30"}),
    ("SandboxFaults", {"singlestream_rollout_tool_faults_total": "0+1x30"}),
    (
        "SandboxFaults",
        {"singlestream_rollout_tool_faults_total": "0+1x30", "singlestream_rollout_tool_calls_total": None},
    ),
    ("SandboxSaturated", {"singlestream_sandbox_queued": "9x30"}),
    ("RetentionAlwaysClipped", {"singlestream_value_store_rho_clip_ratio": "1x30"}),
    ("BaselineUseless", {"singlestream_value_store_brier": "0.4x30"}),
    ("MessagesUnusable", {'singlestream_value_store_stream_entries{stream="dead_letters"}': "0+1x30"}),
    ("QueueStuck", {'singlestream_value_store_stream_oldest_seconds{stream="posterior_updates"}': "90x30"}),
    ("LeaseStuck", {'singlestream_value_store_stream_oldest_seconds{stream="leases"}': "7300x30"}),
    # At the bound the number of those kept stands still, or falls where the bound was lowered.
    (
        "DeadLettersDropped MessagesUnusable",
        {
            'singlestream_value_store_stream_entries{stream="dead_letters"}': "10000x30",
            'singlestream_value_store_dropped_total{what="dead_letters"}': "0+1x30",
        },
    ),
    (
        "DeadLettersDropped",
        {
            'singlestream_value_store_stream_entries{stream="dead_letters"}': "10000x28 100x2",
            'singlestream_value_store_dropped_total{what="dead_letters"}': "0x28 9900x2",
        },
    ),
    ("", {}),
]
"""Alerts that must fire, and no others; what is different from `HEALTHY`, every five minutes. None: no such series."""


@pytest.fixture
async def exported(redis: Redis, keys: Keys) -> set[str]:
    """Names of all series that the services answer with, the value store's once a replica and a learner have worked."""
    store, world = Store(make_config(keys), redis), World(redis, keys)
    await world.start()
    await wake(store)
    await store.upsert(make_prompts(8), [None] * 8)
    await world.publish(0)
    await store.set_training("running")
    await settle(store)
    await store.issue(4)
    assert await world.play(), "leases"
    await world.train()
    await settle(store)
    await check_redis(store)
    registries = [metrics.registry for metrics in (LearnerMetrics(), RolloutMetrics(), SandboxMetrics())]
    text = "\n".join(reply.decode() for reply in (*map(generate_latest, registries), render(store)))
    endings = {"histogram": ("_bucket", "_sum", "_count")}
    typed = re.findall(r"^# TYPE (\S+) (\w+)$", text, re.M)
    return {name + ending for name, kind in typed for ending in endings.get(kind, ("",))}


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def alert_rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def named(text: str) -> set[str]:
    return set(re.findall(r"\bsinglestream_\w+", text))


def test_dashboards_and_rules_ask_for_what_is_exported(exported: set[str]) -> None:
    asked = {path.name: queries(json.loads(path.read_text())) for path in DASHBOARDS}
    asked[RULES.name] = [rule["expr"] for rule in alert_rules()]
    for name, found in asked.items():
        assert found, name
        assert not named("\n".join(found)) - exported, name


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_panels_do_not_overlap_and_use_the_provisioned_source(path: Path) -> None:
    dashboard = json.loads(path.read_text())
    source = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"][0]
    covered: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & covered, panel["title"]
        assert max(x for x, _ in cells) < 24
        covered |= cells
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == source["uid"]


def lost(given: Any, kept: Any, where: str = "") -> Iterator[str]:
    """Places in `given` that are missing or different in `kept`."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            yield from lost(value, kept.get(name), f"{where}.{name}")
    elif isinstance(given, list) and isinstance(kept, list) and len(given) == len(kept):
        for number, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{where}[{number}]")
    elif given != kept:
        yield where


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_have_the_fields_that_grafana_knows(path: Path) -> None:
    """Grafana's SDK reads a dashboard and writes it again, without what it does not know."""
    plugins.register_default_plugins()
    dashboard = json.loads(path.read_text())

    def through_grafana() -> Any:
        return json.loads(encoder.JSONEncoder().encode(Dashboard.from_json(dashboard)))

    assert not list(lost(dashboard, through_grafana()))
    dashboard["panels"][1]["targets"][0]["legendFormt"] = "a mistake"
    assert list(lost(dashboard, through_grafana())) == [".panels[1].targets[0].legendFormt"]


def test_rules_say_what_to_do() -> None:
    rules = alert_rules()
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert rule["labels"]["severity"] in ("page", "warn", "info")
        assert {"summary", "action"} <= set(rule["annotations"])
    in_runbook = set(re.findall(r"\(`([A-Z]\w+)`", (ROOT / "docs" / "operations.md").read_text()))
    assert in_runbook
    assert in_runbook <= {rule["alert"] for rule in rules}


def test_every_service_is_scraped_where_it_listens() -> None:
    jobs = {
        job["job_name"]: job
        for job in yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    }
    targets = {name: job["static_configs"][0]["targets"] for name, job in jobs.items() if "static_configs" in job}
    assert targets == {
        "value_store": ["value_store:8100"],
        "sandbox_gateway": ["sandbox_gateway:8101"],
        "learner": ["learner:8103"],
    }
    assert jobs["rollout"]["dns_sd_configs"][0] | {"refresh_interval": None} == {
        "names": ["rollout"],
        "type": "A",
        "port": 8102,
        "refresh_interval": None,
    }
    assert jobs["value_store"]["authorization"]["credentials_file"] == "/run/secrets/read_token"


@pytest.mark.parametrize(("kind", "name"), [("rules", "rules.yml"), ("config", "prometheus.yml")])
def test_promtool_accepts(kind: str, name: str) -> None:
    """It comes with Debian's package prometheus: `scripts/setup --tests`."""
    only_syntax = ["--syntax-only"] if kind == "config" else []
    command = ["promtool", "check", kind, *only_syntax, str(DEPLOY / "prometheus" / name)]
    reply = subprocess.run(command, capture_output=True, text=True)
    assert reply.returncode == 0, reply.stdout + reply.stderr


def test_exactly_the_right_alerts_fire(tmp_path: Path) -> None:
    """`promtool test rules`: each broken series fires its own alert and no other, and health fires none."""
    assert {alert for alerts, _ in BROKEN for alert in alerts.split()} == {rule["alert"] for rule in alert_rules()}
    tests = [
        {
            "interval": "5m",
            "input_series": [
                {"series": name, "values": values} for name, values in (HEALTHY | series).items() if values
            ],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": "150m",
                    "exp_samples": [{"labels": f'{{alertname="{alert}"}}', "value": 1} for alert in alerts.split()],
                }
            ],
        }
        for alerts, series in BROKEN
    ]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "5m", "tests": tests}))
    reply = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert reply.returncode == 0, reply.stdout + reply.stderr
