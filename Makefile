.DEFAULT_GOAL := help
.PHONY: help setup demo serve test accuracy bench gpu clients check fix dashboards images images-test manifests lock clean

PORT ?= 8000
ARGS ?=
WORKERS ?= 2
TARGETS ?= gateway engine

bin := .venv/bin

# In GiB; enough for the demo model. If unset, vLLM takes nearly all memory of a CPU machine, or refuses to start.
demo serve: export VLLM_CPU_KVCACHE_SPACE ?= 1

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: ## Create .venv and install the pinned packages (most targets do this first)
	@deploy/setup.sh

demo: setup ## Serve the demo model, ask about images, show answers and tokens saved (ARGS="--images FOLDER")
	@$(bin)/visiondrop demo $(ARGS)

serve: setup ## Serve the demo model until Ctrl-C (PORT=8000, ARGS="more options")
	@$(bin)/visiondrop serve --port $(PORT) $(ARGS)

test: setup ## Run the tests (for example ARGS="-m 'not engine' -k schedule"; WORKERS=0 for one process)
	@$(bin)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

accuracy: setup ## Measure the demo model's answers at each budget (for example ARGS="--questions 120")
	@$(bin)/python -m benchmarks.accuracy $(ARGS)

bench: setup ## Stock vLLM, VisionDrop and the limit side by side, half an hour on two cores (ARGS="--only prefill --log")
	@$(bin)/python -m benchmarks.bench $(ARGS)

gpu: setup ## The first hour on a GPU, step by step: docs/gpu.md (for example ARGS="--only machine,eager")
	@$(bin)/python -m benchmarks.gpu $(ARGS)

clients: setup ## Install the clients that tests/clients uses (needs Node.js 20 or newer)
	@PYTHON=$(bin)/python tests/clients/install.sh

check: setup ## Check formatting, lint, types and the order of imports
	@$(bin)/ruff format --check .
	@$(bin)/ruff check .
	@$(bin)/mypy
	@$(bin)/lint-imports --no-cache

fix: setup ## Format, and fix what the linter can fix
	@$(bin)/ruff format .
	@$(bin)/ruff check --fix .

dashboards: setup ## Write Grafana's dashboards anew from deploy/grafana/*.py
	@$(bin)/python -m deploy.grafana

images: ## Build container images with docker, podman or buildah (TARGETS="gateway engine engine-cpu")
	@deploy/images.sh $(TARGETS)

images-test: setup ## Build and run the images gateway and engine-cpu, and docker-compose.yml with them
	@$(bin)/python -m pytest -m images -s -rA tests/images $(ARGS)

manifests: setup ## Write Prometheus' rules for Kubernetes anew from deploy/prometheus/rules
	@$(bin)/python -m deploy.kubernetes

lock: ## Update the pins within what pyproject.toml allows (then: make test)
	@deploy/lock.sh

clean: ## Remove .venv and caches
	@rm -rf .venv .cache tests/clients/js/node_modules .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
