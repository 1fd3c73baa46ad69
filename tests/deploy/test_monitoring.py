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

from tests.deploy.conftest import DEPLOY, ROOT

DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = DEPLOY / "prometheus" / "rules.yml"


BROKEN = {
    "ServiceDown": {'up{job="learner"}': "0x150"},
    "NoReplica": {"singlestream_value_store_replicas": "0x150"},
    "ValueStoreNotReady": {"singlestream_value_store_ready": "0x150"},
    "SandboxNotReady": {"singlestream_sandbox_ready": "0x150"},
    "TrainingStalled": {
        "singlestream_learner_step": "7x150",
        'singlestream_value_store_outstanding_leases{purpose="train"}': "3x150",
    },
    "StepSkipped": {"singlestream_learner_skipped_steps_total": "0+1x150"},
    "EngineAndLearnerDisagree": {"singlestream_learner_logprob_shift_mean_nats": "0.2x150"},
    "EffectiveSampleSizeLow": {"singlestream_learner_effective_sample_size_ratio": "0.4x150"},
    "LearnerIdle": {"singlestream_learner_idle_ratio": "0.8x150"},
    "LeasesFail": {"singlestream_rollout_failed_total": "0+1x150", "singlestream_rollout_episodes_total": "0+10x150"},
    "WeightUpdatesFail": {'singlestream_rollout_weight_updates_total{outcome="refused"}': "0+1x150"},
    "SandboxFaults": {
        "singlestream_rollout_tool_faults_total": "0+1x150",
        "singlestream_rollout_tool_calls_total": "0+10x150",
    },
    "SandboxSaturated": {
        "singlestream_sandbox_used_slots": "4x150",
        "singlestream_sandbox_slots": "4x150",
        "singlestream_sandbox_queued": "9x150",
    },
    "RetentionAlwaysClipped": {"singlestream_value_store_rho_clip_ratio": "1x150"},
    "BaselineUseless": {"singlestream_value_store_brier": "0.4x150"},
    "MessagesUnusable": {'singlestream_value_store_stream_entries{stream="dead_letters"}': "0+1x150"},
    "QueueStuck": {'singlestream_value_store_stream_oldest_seconds{stream="posterior_updates"}': "90x150"},
}
"""Alert → series that break its rule, by the minute."""


def exported() -> set[str]:
    """Names of all series, with the endings that counters and histograms have."""
    from services.learner.metrics import Metrics as Learner
    from services.rollout.metrics import Metrics as Rollout
    from services.sandbox_gateway.metrics import Metrics as Sandbox

    names = set()
    for metrics in (Learner(), Rollout(), Sandbox()):
        for family in metrics.registry.collect():
            endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            names |= {family.name + ending for ending in endings}
    # The value store computes its metrics from a store's memory: their names stand in its source.
    source = (ROOT / "services" / "value_store" / "metrics.py").read_text()
    prefix = "singlestream_value_store_"
    for kind, name in re.findall(r'(\w+)MetricFamily\(\s*f"\{_PREFIX\}_(\w+)"', source):
        names.add(prefix + name + ("_total" if kind == "Counter" else ""))
    for name in re.findall(r'yield _histogram\("(\w+)"', source):
        names |= {f"{prefix}{name}_{ending}" for ending in ("bucket", "sum", "count")}
    return names


def queries(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]


def named(text: str) -> set[str]:
    return set(re.findall(r"\bsinglestream_\w+", text))


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.name)
def test_dashboards_ask_for_what_is_exported(path: Path) -> None:
    found = queries(json.loads(path.read_text()))
    assert found
    assert not named("\n".join(found)) - exported()


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


def test_rules_ask_for_what_is_exported_and_say_what_to_do() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert not named(rule["expr"]) - exported(), rule["alert"]
        assert rule["labels"]["severity"] in ("page", "warn", "info")
        assert {"summary", "action"} <= set(rule["annotations"])


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


def test_every_alert_fires_when_it_should(tmp_path: Path) -> None:
    """`promtool test rules` on a series that breaks each rule."""
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    assert set(BROKEN) == {rule["alert"] for rule in rules}
    tests = [
        {
            "interval": "1m",
            "input_series": [{"series": name, "values": values} for name, values in series.items()],
            "promql_expr_test": [
                {
                    "expr": f'count(ALERTS{{alertname="{alert}", alertstate="firing"}})',
                    "eval_time": "150m",
                    "exp_samples": [{"labels": "{}", "value": 1}],
                }
            ],
        }
        for alert, series in BROKEN.items()
    ]
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": tests}))
    reply = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert reply.returncode == 0, reply.stdout + reply.stderr
