.DEFAULT_GOAL := help
.PHONY: help setup demo demo-smollm2 test attack check format bench clean

help:  ## Show this list.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "%-14s %s\n", $$1, $$2}'

setup:  ## Make .venv and the demo's model; idempotent.
	@scripts/setup

demo: setup  ## Train the tiny model with SPO on this machine; report in runs/demo/report.html.
	@.venv/bin/singlestream demo

demo-smollm2: setup .cache/models/smollm2/config.json  ## The same with SmolLM2-135M.
	@.venv/bin/singlestream demo --model smollm2

.cache/models/smollm2/config.json:
	@.venv/bin/python -m services.learner.make_model smollm2 .cache/models/smollm2

test:  ## Run every test.
	@scripts/setup --tests
	@.venv/bin/python -m pytest

attack:  ## Let the attack tests loose on the sandbox's container image (root, a Docker Engine).
	@scripts/setup --tests
	@docker compose build sandbox_gateway
	@PATH="$(CURDIR)/.venv/bin:$$PATH" deploy/sandbox_gateway/attack_container singlestream-sandbox_gateway:$${TAG:-local}

check: setup  ## Lint, format, types.
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy

format: setup  ## Apply what can be applied by itself.
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

BENCHMARKS = value_store sandbox rollout weights scaling learner learner_memory
bench: setup  ## Run every benchmark; JSON in runs/bench/.
	@mkdir -p runs/bench
	@for name in $(BENCHMARKS); do echo "== $$name"; .venv/bin/python -m benchmarks.$$name --json runs/bench/$$name.json || exit 1; done

clean:  ## Remove runs and caches, not .venv.
	@rm -rf runs .cache .pytest_cache .mypy_cache .ruff_cache
