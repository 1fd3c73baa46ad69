"""What must hold of the compose files, whatever else changes in them."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from singlestream.config import LOOPBACK, load_config
from tests.deploy.conftest import DEPLOY, ROOT, env_file, resolve, tool

TOOLS = {"tools", "estimate", "eval", "export"}
ONE_SHOTS = {"init", "model", "prompts"} | TOOLS
LONG_RUNNING = {"redis", "value_store", "sandbox_gateway", "rollout", "learner"}
"""Services of the main file; overlays add Ray's head and monitoring."""
MONITORING = {"prometheus", "grafana"}
RAY = {"ray_head", "sandbox_relay"}
OVERLAYS = sorted(DEPLOY.glob("compose.*.yml"))


def healthcheck_of(service: dict[str, Any], composed: dict[str, Any]) -> bool:
    """Whether the service, or the stage of the Dockerfile that its image is built from, checks its health."""
    if "healthcheck" in service:
        return not service["healthcheck"].get("disable", False)
    (build,) = (
        one["build"] for one in composed["services"].values() if one["image"] == service["image"] and "build" in one
    )
    stages = re.split(r"^FROM ", (ROOT / build["dockerfile"]).read_text(), flags=re.M)
    return any(f" AS {build['target']}\n" in stage and "\nHEALTHCHECK " in stage for stage in stages)


def long_running(composed: dict[str, Any]) -> set[str]:
    return set(composed["services"]) - ONE_SHOTS


@pytest.fixture(params=["cpu", "cpu_ray", "gpu"])
def composed(request: pytest.FixtureRequest) -> dict[str, Any]:
    config: dict[str, Any] = request.getfixturevalue(request.param)
    return config


def test_every_service_is_known(cpu: dict[str, Any], cpu_ray: dict[str, Any], gpu: dict[str, Any]) -> None:
    assert set(cpu["services"]) == ONE_SHOTS | LONG_RUNNING
    assert set(cpu_ray["services"]) == set(gpu["services"]) == ONE_SHOTS | LONG_RUNNING | MONITORING | RAY


@pytest.mark.parametrize(
    ("profile", "parts"),
    [
        ("cpu", {"rollout", "learner", "model", "prompts"} | RAY),
        ("gpu", {"rollout", "learner"} | RAY),
        ("monitoring", MONITORING),
        ("tools", TOOLS),
    ],
)
def test_each_profile_by_itself_has_its_part(profile: str, parts: set[str]) -> None:
    composed = resolve(*env_file()["COMPOSE_FILE"].split(":"), env_file=".env.example", profile=profile)
    assert set(composed["services"]) == {"init", "redis", "value_store", "sandbox_gateway"} | parts


def test_each_image_has_one_builder_and_is_never_pulled(composed: dict[str, Any]) -> None:
    """Builds run side by side, and two that export one name fail (docker/buildx#3576)."""
    built = Counter(service["image"] for service in composed["services"].values() if "build" in service)
    assert set(built.values()) == {1}
    for name, service in composed["services"].items():
        if service["image"].startswith("singlestream-"):
            assert service["image"] in built, name
            assert "build" in service or service["pull_policy"] == "never", name
    # What everything waits for builds the image of those that any part of the file may start.
    assert "build" in composed["services"]["init"]


def test_up_of_every_profile_starts_no_one_shot_that_nothing_waits_for(cpu: dict[str, Any]) -> None:
    """`up --wait` fails where a container ends that is not waited for as one that ends."""
    awaited = {
        name
        for service in cpu["services"].values()
        for name, how in service.get("depends_on", {}).items()
        if how["condition"] == "service_completed_successfully"
    }
    started = {name for name in ONE_SHOTS if cpu["services"][name].get("scale", 1) > 0}
    assert started <= awaited


def test_long_running_services_restart_and_check_their_health(composed: dict[str, Any]) -> None:
    for name in long_running(composed):
        service = composed["services"][name]
        assert service["restart"] == "unless-stopped", name
        assert healthcheck_of(service, composed), name


def test_one_shots_run_once(composed: dict[str, Any]) -> None:
    for name in ONE_SHOTS:
        assert composed["services"][name]["restart"] == "no", name


def test_only_init_is_root_and_it_has_no_network(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert "no-new-privileges:true" in service["security_opt"], name
        assert not service.get("privileged"), name
        if name == "init":
            assert service["network_mode"] == "none"
        else:
            assert service["user"] == "10001:10001", name
            assert "cap_add" not in service, name


def test_ports_are_on_loopback(composed: dict[str, Any]) -> None:
    published = [port for service in composed["services"].values() for port in service.get("ports", [])]
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}
    assert len({port["published"] for port in published}) == len(published)
    with_ports = {name for name, service in composed["services"].items() if service.get("ports")}
    assert with_ports == {"value_store"} | MONITORING & set(composed["services"])


def test_no_secret_has_a_value_here(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        for key, value in (service.get("environment") or {}).items():
            if re.search(r"TOKEN|PASSWORD|SECRET|REDIS_URL", key):
                assert key.endswith(("_FILE", "_PATH")), (name, key)
                assert value.startswith("/run/secrets/"), (name, key)


def test_each_service_mounts_its_own_secrets_only_to_read(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        if name == "init":
            continue
        mounts = [volume for volume in service.get("volumes", []) if volume["target"] == "/run/secrets"]
        expected = {
            "sandbox_gateway": [],
            "sandbox_relay": [],
            "model": [],
            "prompts": ["secrets_tools"],
            "ray_head": ["secrets_rollout"],
            **{tool_name: ["secrets_tools"] for tool_name in TOOLS},
        }.get(name, [f"secrets_{name}"])
        assert [volume["source"] for volume in mounts] == expected, name
        assert all(volume["read_only"] for volume in mounts), name


def test_the_sandbox_is_alone(composed: dict[str, Any]) -> None:
    sandbox = composed["services"]["sandbox_gateway"]
    assert list(sandbox["networks"]) == ["sandbox"]
    assert composed["networks"]["sandbox"]["internal"]
    assert composed["networks"]["data"]["internal"]
    assert [volume["target"] for volume in sandbox["volumes"]] == ["/app/configs"]
    assert any(option.startswith("seccomp:") for option in sandbox["security_opt"])
    assert sandbox["mem_limit"] == sandbox["memswap_limit"]
    assert sandbox["pids_limit"]
    # A replica shares its network and listens on the other one; a node of Ray cannot choose, and has a relay that does.
    caller, listens = ("sandbox_relay", "RELAY") if "ray_head" in composed["services"] else ("rollout", "ROLLOUT")
    beside = {name for name, s in composed["services"].items() if "sandbox" in (s.get("networks") or {})}
    assert beside == {"sandbox_gateway", caller} | {"prometheus"} & set(composed["services"])
    assert composed["services"][caller]["environment"][f"SINGLESTREAM_{listens}__HOST_TOWARDS"] == "redis"
    if "prometheus" in composed["services"]:
        assert "--web.listen-address=prometheus-front:9090" in composed["services"]["prometheus"]["command"]


def test_rays_processes_ask_for_a_token(cpu_ray: dict[str, Any], gpu: dict[str, Any]) -> None:
    """And call the sandbox by its relay, for Ray listens on every address of a container."""
    for composed in (cpu_ray, gpu):
        assert composed["services"]["sandbox_relay"]["command"] == ["deploy/relay", "sandbox_gateway:8101"]
        for name in ("ray_head", "rollout"):
            url = composed["services"][name]["environment"]["SINGLESTREAM_ROLLOUT__SANDBOX_URL"]
            assert url == "http://sandbox_relay:8101"
            assert list(composed["services"][name]["networks"]) == ["data"]
            assert composed["services"][name]["environment"].items() >= {
                ("RAY_AUTH_MODE", "token"),
                ("RAY_AUTH_TOKEN_PATH", "/run/secrets/ray_token"),
            }
        assert "--node" in composed["services"]["rollout"]["command"]
        assert composed["services"]["ray_head"]["image"] == composed["services"]["rollout"]["image"]


def test_each_machine_of_several_runs_its_part(nodes: dict[str, dict[str, Any]]) -> None:
    parts = {part: set(config["services"]) - {"init"} for part, config in nodes.items()}
    assert parts == {
        "head": {"redis", "value_store", "ray_head"},
        "rollout": {"rollout", "sandbox_gateway"},
        "learner": {"learner"},
    }
    for config in nodes.values():
        assert config["services"]["init"]["environment"]["REDIS_ADDRESS"] == "10.0.0.1:6379"
        for name, service in config["services"].items():
            assert not service.get("ports"), name
            expected = {"init": "none", "sandbox_gateway": None}.get(name, "host")
            assert service.get("network_mode") == expected, name
    gateway, rollout = (nodes["rollout"]["services"][name] for name in ("sandbox_gateway", "rollout"))
    assert nodes["rollout"]["networks"]["sandbox"]["internal"]
    address = gateway["networks"]["sandbox"]["ipv4_address"]
    assert rollout["environment"]["SINGLESTREAM_ROLLOUT__SANDBOX_URL"] == f"http://{address}:8101"
    assert rollout["environment"]["SINGLESTREAM_ROLLOUT__RAY_ADDRESS"] == "10.0.0.1:6380"
    learner = nodes["learner"]["services"]["learner"]
    assert learner["environment"].items() >= {
        # torchrun chooses rank 0's machine, which may be another than the meeting point: each announces itself.
        ("SINGLESTREAM_LEARNER__WEIGHTS_URL", "http://10.0.0.2:8103"),
        ("SINGLESTREAM_RUN__WEIGHTS_TOKEN_FILE", "/run/secrets/weights_token"),
        ("SINGLESTREAM_INTERFACE_WITH", "10.0.0.2"),
    }
    assert {"--rdzv-conf=is_host=1", "--rdzv-endpoint=10.0.0.9:29400"} <= set(learner["command"])
    store = nodes["head"]["services"]["value_store"]["environment"]
    assert store["SINGLESTREAM_VALUE_STORE__HOST"] in LOOPBACK


def test_weights_travel_through_memory(composed: dict[str, Any]) -> None:
    assert composed["volumes"]["weights"]["driver_opts"]["type"] == "tmpfs"
    for name in ("rollout", "learner"):
        targets = {volume["target"]: volume["source"] for volume in composed["services"][name]["volumes"]}
        assert targets["/weights"] == "weights"


def test_stopping_waits_for_the_hand_over(composed: dict[str, Any]) -> None:
    seconds = {
        name: composed["services"][name]["stop_grace_period"] for name in ("rollout", "sandbox_gateway", "learner")
    }
    config = load_config(ROOT / "configs" / "demo-cpu.toml")
    # A Ray node waits for its replica's hand-over, and then for Ray.
    assert seconds["rollout"] == ("1m30s" if "ray_head" in composed["services"] else "1m15s")
    assert 3 * config.rollout.stop_timeout_s < 75
    assert seconds["sandbox_gateway"] == "1m15s"
    assert config.sandbox_gateway.max_timeout_s + 10 < 75
    # torchrun kills the ranks after its own time, 30 s where none is said.
    on_gpus = "-gpu" in composed["services"]["learner"]["image"]
    assert seconds["learner"] == ("10m0s" if on_gpus else "2m0s")
    patience = composed["services"]["learner"]["environment"]["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
    assert patience == ("590" if on_gpus else "110")


def test_a_learner_machine_without_rank_0_is_healthy(nodes: dict[str, dict[str, Any]]) -> None:
    """Nothing answers at its port; torchrun's variables in the ranks' environment say so."""
    kind, test = nodes["learner"]["services"]["learner"]["healthcheck"]["test"]
    assert kind == "CMD-SHELL"
    nobody_answers = test.replace("/app/deploy/healthcheck 8103", "false")
    assert nobody_answers != test
    codes = []
    for node in ("0", "1"):
        with subprocess.Popen(
            ["sh", "-c", "echo started; exec sleep 600"], env={"GROUP_RANK": node}, stdout=subprocess.PIPE
        ) as rank:
            assert rank.stdout is not None
            rank.stdout.readline()
            codes.append(subprocess.run(["sh", "-c", nobody_answers]).returncode)
            rank.kill()
    assert codes == [1, 0]


def test_gpus_are_disjoint(gpu: dict[str, Any]) -> None:
    def indices(service: str) -> set[str]:
        (device,) = gpu["services"][service]["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        return {index for entry in device["device_ids"] for index in entry.split(",")}

    rollout, learner = indices("rollout"), indices("learner")
    assert rollout
    assert learner
    assert not rollout & learner
    service = gpu["services"]["rollout"]
    tensor_parallel = int(service["environment"]["SINGLESTREAM_ROLLOUT__TENSOR_PARALLEL"])
    assert service["deploy"]["replicas"] * tensor_parallel <= len(rollout)
    assert {volume["target"] for volume in service["volumes"]} >= {"/run/gpus"}


def test_the_cpu_profile_asks_for_no_gpu(cpu: dict[str, Any]) -> None:
    for name, service in cpu["services"].items():
        assert "devices" not in service.get("deploy", {}).get("resources", {}).get("reservations", {}), name


def test_the_sandbox_fits_its_memory(composed: dict[str, Any]) -> None:
    file = Path(composed["services"]["sandbox_gateway"]["environment"]["SINGLESTREAM_CONFIG"]).name
    settings = load_config(ROOT / "configs" / file).sandbox_gateway
    assert settings.slots is not None
    assert (settings.slots * settings.memory_mb + 1024) << 20 <= int(
        composed["services"]["sandbox_gateway"]["mem_limit"]
    )


def test_files_that_are_mounted_exist(composed: dict[str, Any]) -> None:
    for name, service in composed["services"].items():
        for volume in service.get("volumes", []):
            if volume["type"] == "bind":
                assert Path(volume["source"]).exists(), (name, volume["source"])
        for option in service.get("security_opt", []):
            if option.startswith("seccomp:"):
                assert (ROOT / option.removeprefix("seccomp:")).exists(), option


def test_build_context_holds_nothing_but_what_images_need() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line for line in lines if line.startswith("!")}
    assert kept == {"!pyproject.toml", "!requirements.lock", "!singlestream", "!services", "!deploy"}
    assert "deploy/secrets" in lines


def test_compose_files_follow_the_specification(
    nodes: dict[str, dict[str, Any]], cpu_ray: dict[str, Any], tmp_path: Path
) -> None:
    # Compose's own tags (!reset) are no YAML that the checker reads: of those files it gets what they resolve to.
    files = [ROOT / "docker-compose.yml", *(path for path in OVERLAYS if "!reset" not in path.read_text())]
    assert {path.name for path in OVERLAYS} - {path.name for path in files} == {"compose.nodes.yml", "compose.ray.yml"}
    for part, config in (nodes | {"cpu_ray": cpu_ray}).items():
        files.append(tmp_path / f"{part}.json")
        files[-1].write_text(json.dumps(config))
    command = [tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", *map(str, files)]
    reply = subprocess.run(command, capture_output=True, text=True)
    assert reply.returncode == 0, reply.stdout


@pytest.mark.parametrize("file", OVERLAYS, ids=lambda path: path.name)
def test_no_anchor_resets(file: Path) -> None:
    """Compose 2.40 drops a `!reset` that comes by an anchor."""
    anchors = re.findall(r"^( *)\S+: &\w+\n((?:\1 +.*\n)+)", file.read_text(), re.M)
    assert not [block for _, block in anchors if "!reset" in block]


def test_torch_comes_from_where_it_can_be_had(tmp_path: Path) -> None:
    """The CPU build from PyTorch's index, and where that is out of reach PyPI's."""
    text = (DEPLOY / "Dockerfile").read_text()
    (command,) = re.findall(r"(if ls /wheels/(?:.*\\\n)+.*; fi)\n", text)
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@" >>"$TMPDIR/asked"\ncase "$*" in *+cpu*) exit "$CPU_BUILD";; esac\n')
    pip.chmod(0o755)
    for cpu_build, asked in (("0", ["torch==2.13.0+cpu"]), ("1", ["torch==2.13.0+cpu", "torch==2.13.0"])):
        (tmp_path / "asked").unlink(missing_ok=True)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "TMPDIR": str(tmp_path), "CPU_BUILD": cpu_build}
        env |= {"TORCH": "2.13.0+cpu", "TORCH_INDEX": "https://index.invalid"}
        assert subprocess.run(["sh", "-c", command], env=env).returncode == 0
        assert [line.split()[-1] for line in (tmp_path / "asked").read_text().splitlines()] == asked


@pytest.mark.parametrize("file", sorted(DEPLOY.rglob("Dockerfile*")), ids=lambda path: path.name)
def test_dockerfiles_lint(file: Path) -> None:
    reply = subprocess.run([tool("hadolint"), str(file)], capture_output=True, text=True)
    assert reply.returncode == 0, reply.stdout
    text = file.read_text()
    assert not text.startswith("# syntax")
    assert "ARG BASE=" in text
    assert "tini" in text
    for stage in re.split(r"^FROM ", text, flags=re.M)[1:]:
        if "\nCMD " in stage:
            assert "USER 10001:10001" in stage


def test_no_listening_host_is_open_by_default() -> None:
    config = load_config(ROOT / "configs" / "demo-cpu.toml")
    assert {config.value_store.host, config.rollout.host, config.sandbox_gateway.host} <= set(LOOPBACK)
