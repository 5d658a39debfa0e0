# Every command of a user. `make` lists them.

PYTHON  ?= python3
PY      := .venv/bin/python
READY   := .venv/.ready
CONFIG  ?= configs/demo.yaml
METHOD  ?=
ARGS    ?=
GPUS    ?=
RESTARTS ?=
SHARDS  ?=
VAL     ?=
WHAT    ?= data
name    := $(basename $(notdir $(CONFIG)))$(if $(METHOD),-$(METHOD))
# the config.yaml of a run means the folder that it is in
own     := $(if $(filter config.yaml,$(notdir $(CONFIG))),$(wildcard $(dir $(CONFIG))versions.jsonl $(dir $(CONFIG))checkpoints/checkpoint-*))
RUN     ?= $(if $(own),$(patsubst %/,%,$(dir $(CONFIG))),runs/$(name))
SCENES  := data/scenes

# one process, or torchrun for several devices
launch   = $(if $(filter-out 1,$(GPUS)),TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 .venv/bin/torchrun --standalone $(if $(RESTARTS),--max-restarts=$(RESTARTS)) --nproc-per-node=$(if $(filter all,$(GPUS)),gpu,$(GPUS)),$(PY))
overrides = run.folder=$(RUN) $(if $(METHOD),method=$(METHOD)) $(if $(SHARDS),data.shards=$(SHARDS) data.val=$(or $(VAL),null)) $(ARGS)

# waiting threads give up their core after a moment: with the default, a second busy process almost stops training
# (measured in docs/lab/2026-11.md)
export GOMP_SPINCOUNT ?= 10000

need = $(if $($(1)),,$(error $(1)=… is missing: $(2)))

.DEFAULT_GOAL := help
.PHONY: help setup scenes shards verify index pretrain eval export bench test test-slow faults check lock docs-reference clean

help: ## this list
	@echo "DenseDINO: photos -> shards -> pretraining -> what it learned"
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv (TORCH=cpu: torch for machines without a GPU)

$(READY): requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v < (3, 14) else f"Python 3.11 to 3.13 is needed, $(PYTHON) is {v[0]}.{v[1]}; PYTHON=python3.12 names another")'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --upgrade pip
ifeq ($(TORCH),cpu)
	$(PY) -m pip install torch torchvision --index-url https://download.pytorch.org/whl/cpu
	$(PY) -m pip install --quiet -e .[dev,remote,onnx]
else
	@echo "installing the packages of requirements.lock (some GB, a minute or two) ..."
	$(PY) -m pip install --quiet --require-hashes -r requirements.lock
endif
	@touch $@

shards: $(READY) ## SRC=photos/ DST=folder [SHARD_MB=256 ARGS='--resize-short 256 --quality 90']: photos -> shards
	$(call need,SRC,a folder of photos or a tar)$(call need,DST,the folder to write shards into)
	@$(PY) -m tools.make_shards make "$(SRC)" "$(DST)" $(if $(SHARD_MB),--shard-mb $(SHARD_MB)) $(ARGS)

verify: $(READY) ## DST=folder: check the hash of every shard
	$(call need,DST,a folder of shards)
	@$(PY) -m tools.make_shards verify "$(DST)" $(ARGS)

index: $(READY) ## DST=folder: write manifest and index for WebDataset tars made elsewhere
	$(call need,DST,a folder of WebDataset tars)
	@$(PY) -m tools.make_shards index "$(DST)" $(ARGS)

scenes: $(READY) # the demo's data: painted scenes and their shards
	@$(PY) -m tools.make_scenes $(SCENES)
	@$(PY) -m tools.make_shards make $(SCENES)/train $(SCENES)/shards/train
	@$(PY) -m tools.make_shards make $(SCENES)/val $(SCENES)/shards/val

pretrain: export STARTED_BY := make pretrain
pretrain: $(READY) $(if $(SHARDS),,$(if $(filter configs/demo.yaml,$(CONFIG)),scenes)) ## train, evaluate, draw [CONFIG=… SHARDS=… VAL=… GPUS=n|all RESTARTS=n RUN=… METHOD=dino ARGS='a.b=c …']
	@$(if $(filter-out 1,$(GPUS)),$(if $(filter-out all,$(GPUS)),WORLD_SIZE=$(GPUS)) $(PY) train.py $(CONFIG) $(overrides) --dry-run >/dev/null)
	@$(launch) train.py $(CONFIG) $(overrides)
	@$(PY) -m tools.finish_run $(RUN) --skip-existing

eval: $(READY) ## RUN=runs/…: k-NN and linear segmentation of a run, beside the same network untrained
	@$(PY) -m eval report $(RUN)
	@$(PY) -m eval html $(RUN)

export: $(READY) ## RUN=runs/… DST=folder [ARGS=--onnx]: the backbone for timm, and ONNX
	$(call need,DST,the folder to write)
	@$(PY) -m tools.export $(RUN) "$(DST)" $(ARGS)

# WHAT=step with several GPUS measures the scaling of training
bench_what = $(if $(and $(GPUS),$(filter step,$(WHAT))),scale,$(WHAT))
bench_args = $(if $(filter scale,$(bench_what)),$(GPUS)) \
  $(if $(SHARDS),$(if $(filter data all scale leak,$(bench_what)),--shards $(SHARDS))) \
  $(if $(SRC),$(if $(filter shards,$(bench_what)),--src $(SRC))) \
  $(if $(filter all scale leak $(if $(filter command,$(origin CONFIG)),checkpoint),$(bench_what)),--config $(CONFIG))

bench: $(READY) $(if $(SHARDS),,$(if $(filter data all scale leak shards,$(bench_what)),scenes)) ## WHAT=data|all|step|leak|plan|knn|checkpoint|gpu_code|shards [GPUS=n with step, SHARDS=…, SRC=… with shards, OUT=rows.jsonl]: images per second
	@$(PY) -m tools.bench $(bench_what) $(bench_args) $(if $(OUT),--out $(OUT)) $(ARGS)

test: $(READY) ## the tests, on any machine (some minutes)
	@$(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(READY) ## the tests that take minutes (compilation, benchmark rows, compiled training on two processes)
	@$(PY) -m pytest -n 2 -m slow $(ARGS)

faults: $(READY) ## all 191 sub-cases of the fault plan (about 10 minutes)
	@FAULTS=all $(PY) -m pytest tests/faults -n 2 --dist worksteal $(ARGS)

check: $(READY) ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

lock: $(READY) # write requirements.lock from pyproject.toml
	@$(PY) -m uv pip compile pyproject.toml --extra dev --extra dali13 --extra remote --extra onnx --universal --python-version 3.11 \
	  --generate-hashes --quiet --no-header -o requirements.lock

docs-reference: $(READY) # write docs/reference/config.md and configs/schema.json from runtime/config/schema.py
	@$(PY) -m runtime.config.reference

clean: ## remove caches (runs, data and .venv are kept)
	rm -rf .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
