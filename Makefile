# One command per habit; CI runs exactly these.
#
#   make up          set everything up (once) and start a cluster in the foreground
#   make test        set everything up and run checks and all tests
#   make help        the rest
#
# ENGINE=sim sets up and starts the simulated engine alone: neither torch nor vLLM. ARGS="..." goes to `tandem up`.

ENGINE ?= vllm
ARGS ?=
COUNT ?= 100000
SEED ?= 1
# Of several Pythons 3.11 the fastest is taken (builds differ by half), unless this one is named: make PYTHON=...
PYTHON ?= $(shell for p in python3.11 python3 python; do \
    if $$p -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then command -v $$p; exit; fi; \
    done; echo python3)
PY := .venv/bin/python
SETUP = $(firstword $(wildcard $(PY)) $(PYTHON)) scripts/setup.py $(if $(filter-out file,$(origin PYTHON)),--this-python)
# The quick ones first; one session, so that all tests with a real engine share one import of it.
SUITES := $(wildcard $(addprefix tests/,unit contract integration chaos e2e))
# Processes are harmed on the simulated engine, unless ENGINE is given.
HARMED := $(if $(filter file,$(origin ENGINE)),sim,$(ENGINE))
ENGINE_FLAG := $(if $(filter sim,$(ENGINE)),--engine sim)

.DEFAULT_GOAL := help
.PHONY: containers faults rolling cancel soak fuzz help setup setup-dev up test check unit contract integration chaos e2e proto docs lock format clean

help:  ## this list
	@grep -hE '^[a-z -]+:.*## ' Makefile | awk -F ':.*## ' '{printf "make %-38s %s\n", $$1, $$2}'

setup:  ## .venv with pinned packages, and the model
	@$(SETUP) --engine $(ENGINE)

setup-dev:  ## the same, and what tests and checks need
	@$(SETUP) --engine $(ENGINE) --dev

up: setup  ## start a cluster in the foreground; Ctrl-C ends it
	@exec .venv/bin/tandem up $(ENGINE_FLAG) $(ARGS)

test: setup-dev  ## checks, then all tests, the quick ones first
	@$(PY) scripts/check.py
	@$(PY) -m pytest $(SUITES)
	@$(PY) -m tests.containers --light

check: setup-dev  ## ruff, mypy, import-linter, buf, generated code and pages up to date
	@$(PY) scripts/check.py

unit contract integration e2e: setup-dev  ## one test suite
	@$(PY) -m pytest tests/$@

containers: setup-dev  ## images, compose file, port suites in containers; on the Docker engine that answers, or on one of their own
	@$(PY) -m tests.containers $(ARGS)

fuzz: setup-dev  ## hostile inputs to the frontend, COUNT of them; then COUNT guided by coverage, twice
	@$(PY) -m tests.fuzz.hostile --count $(COUNT) --seed $(SEED)
	@$(PY) -m tests.fuzz.guided --target parsers --runs $(COUNT) --seed $(SEED)
	@$(PY) -m tests.fuzz.guided --target bodies --runs $(COUNT) --seed $(SEED)

faults: setup-dev  ## every fault of every process under load; ENGINE=sim|vllm, ONLY="decode worker"
	@$(PY) -m tests.faults.matrix --engine $(HARMED) --only "$(ONLY)" $(ARGS)

chaos: setup-dev  ## any mix of faults; SEED=, MINUTES=, ENGINE=sim|vllm
	@$(PY) -m tests.faults.chaos --engine $(HARMED) --seed $(SEED) --minutes $(or $(MINUTES),10) $(ARGS)

rolling: setup-dev  ## every process restarted in turn, under load; ENGINE=sim|vllm, ONLY="frontend"
	@$(PY) -m tests.faults.rolling --engine $(HARMED) --only "$(ONLY)" $(ARGS)

cancel: setup-dev  ## what cancelled requests leave behind, and what they cost the next; ENGINE=sim|vllm
	@$(PY) -m tests.faults.cancel --engine $(HARMED) $(ARGS)

soak: setup-dev  ## an hour of steady load: does anything grow? MINUTES=
	@$(PY) -m tests.faults.soak --minutes $(or $(MINUTES),60) $(ARGS)

proto: setup-dev  ## generate src/tandem/v1 from proto/
	@$(PY) scripts/proto.py

docs: setup-dev  ## generate the reference pages in docs/ and the dashboards in deploy/observability/
	@$(PY) docs/generate.py
	@$(PY) deploy/observability/dashboards.py

bench-sim: setup-dev  ## simulated goodput of ours against static fleets; QUICK=1, TRACES="FILE ..."
	@$(PY) -m bench.bench_sim $(if $(QUICK),--quick) $(addprefix --trace ,$(TRACES)) $(ARGS)

bench-tracing: setup-dev  ## CPU per request with tracing off, at 1 % and at 100 %
	@$(PY) -m bench.bench_tracing $(ARGS)

bench-console: setup-dev  ## script per frame of the console's map while 500 workers stream into it; needs Chromium
	@$(PY) -m bench.bench_console $(ARGS)

bench-serve: setup-dev  ## cost of serving, beside a peer whose KIT=FOLDER is given; QUICK=1
	@$(PY) -m bench.serve $(if $(KIT),--kit $(KIT)) $(if $(QUICK),--quick) $(ARGS)

bench-router: setup-dev  ## placements a second that one router process sustains, with real NATS and Redis
	@$(PY) -m bench.bench_router $(ARGS)

bench-engine: setup-dev  ## real vLLM: disaggregated against aggregated, overhead over a bare engine, KV transfer
	@$(PY) -m bench.bench_engine $(ARGS)

tokenizer-fuzz: setup-dev  ## the fast tokenisers (tokie, remembered words) against Hugging Face's on COUNT random texts
	@TOKENIZER_TEXTS=$(COUNT) TOKENIZER_SEED=$(SEED) $(PY) -m pytest tests/unit/frontend/test_fast_tokenizer.py tests/unit/frontend/test_word_memo.py -k same_tokens

bench-profile: setup-dev  ## does the simulator predict this machine? a real run, and the same arrivals simulated
	@$(PY) -m bench.bench_profile $(ARGS)

bench-qos: setup-dev  ## what tenants and classes get from a live router under overload
	@$(PY) -m bench.bench_qos $(ARGS)

format: setup-dev  ## format the code
	@$(PY) -m ruff check --fix --quiet .
	@$(PY) -m ruff format --quiet .

lock: setup-dev  ## write requirements/{base,dev}.lock again after a change in pyproject.toml
	@$(PY) requirements/lock.py

clean:  ## remove .venv and all caches of the tools
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build src/*.egg-info *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
