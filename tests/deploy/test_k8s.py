"""The Kubernetes manifests against Kubernetes' own schemas, and what must hold of them besides."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from singlestream.config import load_config
from singlestream.plan import plan
from tests.deploy.conftest import DEPLOY, ROOT

VERSION = "1.31"
"""Pods' appArmorProfile came with 1.30."""
FILES = sorted((DEPLOY / "k8s").glob("*.yaml"))
NAMES = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def documents() -> Iterator[dict[str, Any]]:
    for path in FILES:
        yield from yaml.safe_load_all(path.read_text())


def find(kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in documents() if (d["kind"], d["metadata"]["name"]) == (kind, name)]
    return found


def pod_templates() -> dict[str, dict[str, Any]]:
    """Every pod's template by where it stands; those of the RayService too."""
    found = {}
    for one in documents():
        name = one["metadata"]["name"]
        if one["kind"] == "RayService":
            cluster = one["spec"]["rayClusterConfig"]
            found["ray-head"] = cluster["headGroupSpec"]["template"]
            for group in cluster["workerGroupSpecs"]:
                found[group["groupName"]] = group["template"]
        elif one["kind"] == "Pod":
            found[name] = {"metadata": one["metadata"], "spec": one["spec"]}
        elif "template" in one.get("spec", {}):
            found[name] = one["spec"]["template"]
    return found


PODS = pod_templates()

STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
OBJECT, TEXT, FLAG, COUNT = (
    {"type": "object"},
    {"type": "string"},
    {"type": "boolean"},
    {"type": "integer", "minimum": 0},
)


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object with these fields and no others."""
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


OF_A_GROUP = {"rayStartParams": STRINGS, "resources": STRINGS, "labels": STRINGS, "template": OBJECT}
RAY_CLUSTER = closed(
    "headGroupSpec",
    rayVersion=TEXT,
    enableInTreeAutoscaling=FLAG,
    authOptions=closed(mode={"enum": ["disabled", "token"]}, secretName=TEXT, enableK8sTokenAuth=FLAG),
    autoscalerOptions=OBJECT,
    gcsFaultToleranceOptions=OBJECT,
    headServiceAnnotations=STRINGS,
    upgradeStrategy=closed(type={"enum": ["Recreate", "None"]}),
    managedBy=TEXT,
    suspend=FLAG,
    headGroupSpec=closed("template", serviceType=TEXT, headService=OBJECT, enableIngress=FLAG, **OF_A_GROUP),
    workerGroupSpecs={
        "type": "array",
        "items": closed(
            "groupName",
            "minReplicas",
            "maxReplicas",
            "template",
            groupName=TEXT,
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            numOfHosts=COUNT,
            idleTimeoutSeconds=COUNT,
            suspend=FLAG,
            scaleStrategy=closed(workersToDelete={"type": "array", "items": TEXT}),
            **OF_A_GROUP,
        ),
    },
)
RAY_SERVICE = closed(
    "rayClusterConfig",
    serveConfigV2=TEXT,
    rayClusterConfig=RAY_CLUSTER,
    serveService=OBJECT,
    upgradeStrategy=OBJECT,
    rayClusterDeletionDelaySeconds=COUNT,
    excludeHeadPodFromServeSvc=FLAG,
    managedBy=TEXT,
    suspend=FLAG,
)
"""A RayService's ``spec`` by KubeRay's API reference (ray.io/v1); pods' templates are checked as Kubernetes' own."""


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_manifests_follow_the_schemas(path: Any) -> None:
    for one in yaml.safe_load_all(path.read_text()):
        assert NAMES.fullmatch(one["metadata"]["name"])
        if one["kind"] != "RayService":
            kubernetes_validate.validate(one, VERSION, strict=True)


@pytest.mark.parametrize("name", ["ray-head", "replicas"])
def test_pods_of_the_rayservice_follow_the_schemas(name: str) -> None:
    template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": name}, "template": PODS[name]}
    kubernetes_validate.validate(template, VERSION, strict=True)


def test_the_rayservice_has_the_fields_that_kuberay_knows() -> None:
    jsonschema.validate(find("RayService", "rollout")["spec"], RAY_SERVICE)


@pytest.mark.parametrize(
    ("field", "value"), [("replica", 5), ("replicas", "5"), ("rayStartParams", {"num-cpus": 1}), ("groupName", None)]
)
def test_a_wrong_field_of_the_rayservice_is_found(field: str, value: Any) -> None:
    spec = find("RayService", "rollout")["spec"]
    spec["rayClusterConfig"]["workerGroupSpecs"][0][field] = value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(spec, RAY_SERVICE)


def test_a_wrong_field_is_found() -> None:
    one = find("Deployment", "value-store")
    one["spec"]["template"]["spec"]["containers"][0]["livenesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(one, VERSION, strict=True)


def test_every_pod_is_confined() -> None:
    assert set(PODS) == {"redis", "value-store", "sandbox-gateway", "learner", "ray-head", "replicas", "tools"}
    for name, template in PODS.items():
        spec = template["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["securityContext"]["runAsUser"] == 10001, name
        assert spec["securityContext"]["runAsNonRoot"], name
        assert spec["securityContext"]["seccompProfile"]["type"] in ("RuntimeDefault", "Localhost"), name
        assert not spec.get("hostNetwork"), name
        for container in spec["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False, name
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, name
            assert {"requests", "limits"} <= set(container["resources"]), name
            gpus = [container["resources"][kind].get("nvidia.com/gpu") for kind in ("requests", "limits")]
            assert gpus[0] == gpus[1], name


def test_the_namespace_admits_the_sandbox() -> None:
    """Pod security's "baseline" refuses pods without AppArmor's default profile."""
    assert PODS["sandbox-gateway"]["spec"]["securityContext"]["appArmorProfile"] == {"type": "Unconfined"}
    labels = find("Namespace", "singlestream")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "privileged"


def test_pods_are_probed() -> None:
    for name, template in PODS.items():
        if name == "tools":  # sleeps
            continue
        (container,) = template["spec"]["containers"]
        assert "livenessProbe" in container, name
        # Probes count failures, and kubelet ends what is hung; the script's own count is for Docker.
        if "/app/deploy/healthcheck" in str(container["livenessProbe"]):
            assert {"name": "SINGLESTREAM_HUNG_AFTER", "value": "0"} in container["env"], name
        # Every pod but the learner's: KubeRay's own probes call wget, which the images lack.
        assert "readinessProbe" in container or name == "learner", name
        assert template["spec"]["terminationGracePeriodSeconds"] >= 30, name


def test_stopping_covers_the_hand_over() -> None:
    config = load_config(ROOT / "configs" / "qwen3-8b-dapo-spo.toml")
    replica = PODS["replicas"]["spec"]
    assert replica["terminationGracePeriodSeconds"] > 3 * config.rollout.stop_timeout_s
    assert replica["containers"][0]["lifecycle"]["preStop"]["exec"]["command"] == ["/app/deploy/hand-over"]
    assert PODS["sandbox-gateway"]["spec"]["terminationGracePeriodSeconds"] > config.sandbox_gateway.max_timeout_s + 10
    learner = PODS["learner"]["spec"]
    patience = {"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(learner["terminationGracePeriodSeconds"] - 10)}
    assert patience in learner["containers"][0]["env"], (
        "torchrun kills the ranks after its own time, 30 s where none is said"
    )


def test_memory_holds_the_weights() -> None:
    """Three versions where they are read; where they are fetched from, one more."""
    for name, network in (("replicas", None), ("learner", 100)):
        needed_gib = plan(8.2e9, 8, 5000, network_gbit_per_s=network).weights_volume_gib
        (volume,) = [one for one in PODS[name]["spec"]["volumes"] if one["name"] == "weights"]
        assert int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) > needed_gib


def test_tools_hold_every_secret_that_is_made_for_them() -> None:
    tools = PODS["tools"]["spec"]["containers"][0]
    held = {one["value"] for one in tools["env"] if one["name"].endswith("_FILE")}
    assert held == {"/run/secrets/read_token", "/run/secrets/write_token"}
    assert find("NetworkPolicy", "tools")["spec"]["podSelector"] == {"matchLabels": {"app": "tools"}}
    for image in ("Dockerfile", "Dockerfile.gpu"):
        assert "deploy/post_prompts" in (DEPLOY / image).read_text()


def test_what_pods_name_exists() -> None:
    reply = subprocess.run([sys.executable, str(DEPLOY / "k8s" / "make-secrets")], capture_output=True, text=True)
    assert reply.returncode == 0, reply.stderr
    secrets = {one["metadata"]["name"]: set(one["stringData"]) for one in json.loads(reply.stdout)["items"]}
    assert "redis" in secrets
    assert "users.acl" in secrets["redis"]
    claims = {d["metadata"]["name"] for d in documents() if d["kind"] == "PersistentVolumeClaim"} | {"data"}
    services = {d["metadata"]["name"] for d in documents() if d["kind"] == "Service"}
    for name, template in PODS.items():
        (container,) = template["spec"]["containers"]
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        mounts = {mount["name"]: mount["mountPath"] for mount in container.get("volumeMounts", [])}
        assert set(mounts) <= set(volumes) | {"data"}, name
        for volume in volumes.values():
            assert volume.get("configMap", {}).get("name") in (None, "configs", "redis"), name
            assert volume.get("secret", {}).get("secretName") in (None, *secrets), name
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in (None, *claims), name
        held = secrets.get(volumes.get("secrets", {}).get("secret", {}).get("secretName", ""), set())
        for variable in container.get("env", []):
            key = variable["name"]
            if key == "SINGLESTREAM_CONFIG":
                assert (ROOT / "configs" / variable["value"].removeprefix("/app/configs/")).is_file(), name
            elif key.endswith("_FILE"):
                assert variable["value"].removeprefix("/run/secrets/") in held, (name, key)
            elif reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in secrets[reference["name"]], (name, key)
            elif host := re.match(r"http://([-a-z0-9]+\.)?([-a-z]+):\d+$", variable.get("value", "")):
                assert host[2] in services, (name, key)
            assert not re.search(r"TOKEN|REDIS_URL|PASSWORD", key) or "value" not in variable or key.endswith("_FILE")


def test_nothing_is_reachable_by_default_and_the_sandbox_calls_nobody() -> None:
    everything = find("NetworkPolicy", "nothing-by-default")["spec"]
    assert everything == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    allowed = [d["spec"] for d in documents() if d["kind"] == "NetworkPolicy" and "egress" in d["spec"]]
    for spec in allowed:
        selector = spec["podSelector"]
        if "matchExpressions" in selector:
            (expression,) = selector["matchExpressions"]
            assert expression["operator"] == "NotIn"
            assert "sandbox-gateway" in expression["values"]
        else:
            assert selector["matchLabels"]["app"] != "sandbox-gateway"
    labels = {template["metadata"]["labels"]["app"] for template in PODS.values()}
    for one in documents():
        if one["kind"] == "NetworkPolicy":
            assert set(re.findall(r"'app': '([-a-z]+)'", str(one["spec"]))) <= labels, one["metadata"]["name"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what Ray's imports warn of is not ours
def test_serve_and_ray_start_know_what_the_rayservice_gives_them() -> None:
    """Both take what they do not know without a word: what Ray understood is compared with what stands there."""
    from ray.scripts.scripts import start
    from ray.serve.schema import ServeDeploySchema

    spec = find("RayService", "rollout")["spec"]

    def understood(config: dict[str, Any]) -> Any:
        return ServeDeploySchema.model_validate(config).model_dump(mode="json", exclude_unset=True)

    config = yaml.safe_load(spec["serveConfigV2"])
    assert understood(config) == config
    config["applications"][0]["import_pth"] = "a mistake"
    assert understood(config) != config
    options = {option for parameter in start.params for option in parameter.opts}
    cluster = spec["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert {f"--{name}" for name in group["rayStartParams"]} <= options


def test_ray_matches_the_lock_and_the_application() -> None:
    spec = find("RayService", "rollout")["spec"]
    assert f"ray=={spec['rayClusterConfig']['rayVersion']}" in (ROOT / "requirements.lock").read_text().split()
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    module, _, name = application["import_path"].partition(":")
    assert f"def {name}(" in (ROOT / f"{module.replace('.', '/')}.py").read_text()
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    # A JSON text in quotes: KubeRay puts it on a shell's command line.
    assert json.loads(json.loads(group["rayStartParams"]["resources"])) == {"rollout_slot": 1}
    assert spec["rayClusterConfig"]["authOptions"] == {"mode": "token"}
    for parameters in (group["rayStartParams"], spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]):
        assert all(isinstance(value, str) for value in parameters.values())


def test_the_learners_meet_where_the_first_of_them_is() -> None:
    job = find("Job", "learner")["spec"]
    arguments = job["template"]["spec"]["containers"][0]["args"]
    assert job["parallelism"] == job["completions"]
    assert f"--nnodes={job['parallelism']}" in arguments
    assert "--rdzv-endpoint=learner-0.learner:29400" in arguments
    assert job["completionMode"] == "Indexed"
    service = find("Service", "learner")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"]
    assert job["template"]["spec"]["subdomain"] == "learner"
