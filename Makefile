# make demo: the main job on a small real model.  make test: the tests.  Both set up what they need.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
RUN := $(VENV)/bin/python
TABLES := 1 2 3 4

.PHONY: help setup demo test test-real test-browser test-launchers test-all fuzz lint format report noise-floor
.PHONY: tables $(TABLES:%=table-%) wandb-sync wandb-report resolve audit constraints clean

help:
	@echo "make demo        compress SmolLM2-135M four ways, measure, print the table (seven to eleven minutes on 2 cores)"
	@echo "make test        the fast tests: no network, no GPU"
	@echo "make test-real   the tests on the real model"
	@echo "make test-browser  the tests of the report in Chromium"
	@echo "make test-launchers  sweeps in several processes; on Slurm (Debian: slurm-wlm munge) and Ray where they are installed"
	@echo "make fuzz        torn and hostile records, models, GGUF files, wheels: a minute for each (FUZZ_SECONDS)"
	@echo "make report      results/report.html: plots and tables of all records; RESULTS=DIR for those of another folder"
	@echo "make tables      every table, from the records in results/"
	@echo "make table-1     run what table I needs and print it (hours); table-2, table-3 and table-4 likewise"
	@echo "make noise-floor how far apart two equal runs lie on this machine; tables and verify use it (fifteen minutes;"
	@echo "                 HARDWARE=h100 for a GPU)"
	@echo "make wandb-sync    upload runs that were logged offline, refusing incomplete ones; PROJECT=..., ENTITY=..."
	@echo "make wandb-report  the tables as a W&B report and workspaces, with panels"
	@echo "make resolve     does pip find versions for every extra? Downloads nothing but descriptions; needs a registry"
	@echo "make audit       known vulnerabilities of the versions in constraints.txt; needs PyPI's own index"
	@echo "make constraints constraints.txt: the versions in .venv, for pip install --constraint constraints.txt"
	@echo "make lint        ruff: rules and format"
	@echo "make setup       .venv with everything above (others call it); TORCH=... chooses another torch"

setup: $(VENV)/.ready

# torch first and by itself: a plain "torch" would fetch a newer build than the tested one
$(VENV)/.ready: pyproject.toml
	@test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	@touch $@

demo: setup
	$(RUN) -m harness -m method=awq,gptq bits=3,4 model=smollm2-135m-gguf hardware=cpu evaluation=quick

test: setup
	$(RUN) -m pytest -n auto --dist worksteal -m "not real_model and not browser and not launcher"

test-real: setup
	$(RUN) -m pytest -m real_model

test-browser: setup
	$(RUN) -m pytest -m browser

test-launchers: setup
	$(RUN) -m pytest -m launcher

# bounded: about FUZZ_SECONDS for each of the readers
FUZZ_SECONDS ?= 60
fuzz: setup
	HARNESS_FUZZ_SECONDS=$(FUZZ_SECONDS) $(RUN) -m pytest tests/harness/test_corrupt_inputs.py -k any

test-all: setup
	$(RUN) -m pytest

lint: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: setup
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

report: setup
	$(RUN) -m harness.report $(if $(RESULTS),paths.results=$(RESULTS))

noise-floor: setup
	$(RUN) -m harness.noise_floor method=gptq bits=4 model=smollm2-135m-gguf hardware=$(or $(HARDWARE),cpu) evaluation=quick runs=5

tables: setup
	$(RUN) -m harness.tables all

table-1: setup
	-$(RUN) -m harness experiment=table_1 evaluation=quick
	-$(RUN) -m harness experiment=table_1_two_bits evaluation=quick
	$(RUN) -m harness.tables table_1

table-2: setup
	-$(RUN) -m harness experiment=table_2 evaluation=quick
	-$(RUN) -m harness experiment=table_2_structured evaluation=quick
	$(RUN) -m harness.tables table_2

table-3: setup
	-$(RUN) -m harness experiment=table_3
	-$(RUN) -m harness experiment=table_3_blackbox
	$(RUN) -m harness.tables table_3

table-4: setup
	-$(RUN) -m harness experiment=table_4
	-$(RUN) -m harness -m 'method=[gptq,attention_sinks],[gptq,speculative_decoding],[kv_cache,speculative_decoding]' evaluation=architecture \
		hardware.steps=plain
	$(RUN) -m harness.tables table_4

WANDB_OPTIONS = $(if $(PROJECT),project=$(PROJECT)) $(if $(ENTITY),entity=$(ENTITY))

wandb-sync: setup
	$(RUN) -m harness.wandb_sync $(WANDB_OPTIONS)

wandb-report: setup
	$(RUN) -m harness.wandb_report $(WANDB_OPTIONS)

# every extra by itself: the ranges of one may not admit those of another
EXTRAS = joblib slurm ray peers vllm wandb dev
resolve: setup
	@failed=0; $(foreach extra,$(EXTRAS),echo "[$(extra)]"; $(RUN) -m pip install --dry-run --quiet --no-build-isolation \
		--disable-pip-version-check ".[$(extra)]" || { echo "[$(extra)] does not resolve"; failed=1; };) exit $$failed

# known vulnerabilities of the versions in constraints.txt; what could not be looked up counts as a failure
audit:
	@test -x .audit/bin/pip-audit || { $(PYTHON) -m venv .audit && .audit/bin/pip install --quiet pip-audit; }
	.audit/bin/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict --progress-spinner off

constraints: setup
	{ sed -n '/^#/p' constraints.txt; $(RUN) -m pip list --format=freeze --exclude-editable \
		| sed -e 's/+cpu$$//' -e '/^triton=/d' -e '/^pip=/d' | sort -f; } > constraints.new
	mv constraints.new constraints.txt

clean:
	rm -rf results/scratch
