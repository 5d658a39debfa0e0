# Every command of a user. `make` lists them.

PY       := .venv/bin/python
READY    := .venv/.ready
PYTHON   ?= python3
WHAT     ?= data
SCENES   := data/scenes

# ---------------------------------------------------------------------------------------- words of the command line

TARGETS  := help setup plan scenes shards verify index pretrain slurm table1 tables eval features export bench gpu test test-slow faults check lock docs-reference docs clean

# the variables that a target takes, besides those of the installation
takes_shards    := SRC DST SHARD_MB ARGS
takes_verify    := DST ARGS
takes_index     := DST ARGS
takes_plan      := IMAGES SHARDS SRC CONFIG GPU GPUS SHARD_MB WRITE ARGS
takes_pretrain  := CONFIG SHARDS VAL GPUS RUN RESTARTS METHOD ARGS
takes_slurm     := NODES GPUS CONFIG SHARDS VAL RUN METHOD OUT ARGS
takes_table1    := SCALE SEEDS ARGS
takes_tables    := TABLE SCALE SEEDS ARGS
takes_eval      := RUN CONFIG METHOD ARGS
takes_features  := RUN CONFIG METHOD SRC OUT ARGS
takes_export    := RUN CONFIG METHOD DST TO ARGS
takes_bench     := WHAT METHODS GPUS CONFIG SHARDS SRC OUT ARGS
takes_gpu       := SHARDS OUT ARGS
takes_test      := ARGS
takes_test-slow := ARGS
takes_faults    := ARGS
takes_docs      := ARGS
takes_install   := PYTHON TORCH
VARIABLES := $(sort $(foreach target,install $(TARGETS),$(takes_$(target))))
# variables of programs, which make passes on as it does those of the environment
PASSED := %_NUM_THREADS OMP_% MKL_% GOMP_% KMP_% CUDA_% NVIDIA_% NCCL_% GLOO_% TORCH_% TORCHINDUCTOR_% PYTORCH_% PYTHON% AWS_% \
  FSSPEC_% GOOGLE_% AZURE_% HF_% WANDB_% MLFLOW_% HTTP_PROXY HTTPS_PROXY NO_PROXY http_proxy https_proxy no_proxy PIP_% UV_% MAKE% SHELL PATH HOME TMPDIR XDG_% LANG LC_% \
  COLUMNS TERM CC CXX ORACLE FAULTS

# a word or path, for the shell
quote = '$(subst ','\'',$(1))'
given := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
takes := $(sort $(takes_install) $(foreach target,$(or $(MAKECMDGOALS),help),$(takes_$(target))))
no_target   := $(filter-out $(TARGETS),$(MAKECMDGOALS))
no_variable := $(filter-out $(takes) $(PASSED),$(given))
ifneq ($(no_target)$(no_variable),)
  wrong := $(foreach word,$(no_target),$(call quote,$(word))) $(foreach name,$(no_variable),$(call quote,$(name)=$(value $(name))))
  message := $(shell $(or $(wildcard $(PY)),$(PYTHON)) -m tools.make_words --goals '$(filter $(TARGETS),$(MAKECMDGOALS))' \
    --targets '$(TARGETS)' --takes '$(takes)' --variables '$(VARIABLES)' -- $(wrong))
  $(error $(or $(message),no such target or variable: $(no_target) $(no_variable)))
endif

# A value is what was typed: `$` in it means nothing to make. Recipes read it from the environment, as "$$NAME", so that
# blanks, quotes and parentheses in it mean nothing to the shell either; only ARGS is words for the shell.
literal = $(if $(filter command environment,$(origin $(1))),$(eval override $(1) := $$(value $(1))))
$(foreach name,$(VARIABLES),$(call literal,$(name)))
export $(VARIABLES)
need = $(if $($(1)),,$(error $(1)=… is missing: $(2)))

# the run folder: that of the run whose config.yaml is named, else runs/<config>
override CONFIG := $(or $(CONFIG),configs/demo.yaml)
empty  :=
blank  := $(empty) $(empty)
config := $(subst $(blank),<blank>,$(CONFIG))
folder := $(subst <blank>,$(blank),$(patsubst %/,%,$(dir $(config))))
named  := $(subst <blank>,$(blank),$(basename $(notdir $(config))))$(if $(METHOD),-$(METHOD))
of_run := $(if $(filter %/config.yaml,$(config)),$(shell (cd $(call quote,$(folder)) && ls versions.jsonl checkpoints/checkpoint-*) 2>/dev/null))
override RUN := $(or $(RUN),$(if $(of_run),$(folder),runs/$(named)))

# waiting threads give up their core after a moment: with the default, a second busy process almost stops training
# (measured in docs/lab/2026-11.md)
export GOMP_SPINCOUNT ?= 10000

# ------------------------------------------------------------------------------------------------------------ targets

.DEFAULT_GOAL := help
.PHONY: $(TARGETS) ready

help: ## this list
	@echo "DenseDINO: photos -> shards -> pretraining -> what it learned"
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# the kind of torch is that of the environment, if there is one
cpu_torch := $(wildcard .venv/lib/python3*/site-packages/torch-*+cpu.dist-info)
kind := $(or $(shell cat $(READY) 2>/dev/null),$(if $(cpu_torch),cpu),$(if $(wildcard $(READY)),cuda))
override TORCH := $(or $(TORCH),$(kind),cuda)

setup: $(READY) ## install everything into .venv (TORCH=cpu: torch for machines without a GPU)

# an environment is made where there is none; only `make setup` changes one
$(READY): $(if $(filter setup,$(MAKECMDGOALS)),requirements.lock $(if $(filter-out $(TORCH),$(kind)),FORCE))
	$(if $(filter cpu cuda,$(TORCH)),,$(error TORCH=$(TORCH): cpu or cuda))
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
	@echo $(TORCH) > $@

FORCE:

ready: $(READY)
	$(if $(filter cpu cuda,$(TORCH)),,$(error TORCH=$(TORCH): cpu or cuda))
	$(if $(filter-out $(TORCH),$(kind)),$(error TORCH=$(TORCH): .venv has torch for $(kind); `make setup TORCH=$(TORCH)` replaces it))
	@[ ! requirements.lock -nt $(READY) ] || echo "requirements.lock is newer than .venv: \`make setup\` updates it" >&2

shards: ready ## SRC='photos/ more.zip …' DST=folder|s3://… [SHARD_MB=256 ARGS='--resize-short 256 --quality 90']: photos -> shards
	$(call need,SRC,photos: a folder or tar or zip or Parquet or a table)$(call need,DST,the folder to write shards into)
	@$(PY) -m tools.make_shards make "$$SRC" "$$DST" $(if $(SHARD_MB),--shard-mb "$$SHARD_MB") $(ARGS)

verify: ready ## DST=folder: check the hash of every shard
	$(call need,DST,a folder of shards)
	@$(PY) -m tools.make_shards verify "$$DST" $(ARGS)

index: ready ## DST=folder: write manifest and index for WebDataset tars made elsewhere
	$(call need,DST,a folder of WebDataset tars)
	@$(PY) -m tools.make_shards index "$$DST" $(ARGS)

# without CONFIG, one is proposed
plan: ready ## IMAGES=10000|SHARDS=…|SRC=photos/ [CONFIG=… GPU=h100|4090|24GB|cpu GPUS=n WRITE=configs/mine.yaml ARGS='a.b=c …']: which config, memory, hours, disk
	@$(PY) -m tools.plan --images="$$IMAGES" --shards="$$SHARDS" --src="$$SRC" --gpu="$$GPU" --gpus="$$GPUS" --shard-mb="$$SHARD_MB" \
	  --write="$$WRITE" $(if $(filter CONFIG,$(given)),--config="$$CONFIG") $(ARGS)

scenes: ready # the demo's data: painted scenes and their shards
	@$(PY) -m tools.make_scenes $(SCENES)
	@$(PY) -m tools.make_shards make $(SCENES)/train $(SCENES)/shards/train
	@$(PY) -m tools.make_shards make $(SCENES)/val $(SCENES)/shards/val

pretrain: export STARTED_BY := make pretrain
pretrain: ready $(if $(SHARDS),,$(if $(filter configs/demo.yaml configs/%_scenes.yaml,$(config)),scenes)) ## train, evaluate, draw [CONFIG=… SHARDS=… VAL=… GPUS=n|all RESTARTS=n RUN=… METHOD=dino ARGS='a.b=c …']
	@$(PY) -m tools.pretrain --run="$$RUN" --method="$$METHOD" --shards="$$SHARDS" --val="$$VAL" --gpus="$$GPUS" --restarts="$$RESTARTS" "$$CONFIG" $(ARGS)
	@$(if $(filter --dry-run --check --help -h,$(ARGS)),,$(PY) -m tools.finish_run "$$RUN" --skip-existing)

slurm: ready ## GPUS=n [NODES=n CONFIG=… SHARDS=… OUT=job.sbatch ARGS='--time 24:00:00 --partition NAME a.b=c …']: a job script for Slurm
	$(call need,GPUS,how many for each node)
	@$(PY) -m tools.slurm --nodes="$$NODES" --gpus="$$GPUS" --run="$$RUN" --method="$$METHOD" --shards="$$SHARDS" --val="$$VAL" --out="$$OUT" "$$CONFIG" $(ARGS)

# without other photos, both are made on the painted scenes
of_paper := $(if $(or $(filter paper,$(SCALE)),$(findstring --photos,$(ARGS)),$(findstring data.shards=,$(ARGS))),,scenes)

table1: export STARTED_BY := make table1
table1: ready $(of_paper) ## the paper's Table 1: all methods, trained and measured [SCALE=small|paper SEEDS=n ARGS='--dry-run …']
	@$(PY) -m tools.paper table1 $(if $(SCALE),--scale "$$SCALE") $(if $(SEEDS),--seeds "$$SEEDS") $(ARGS)

tables: export STARTED_BY := make tables
tables: ready $(of_paper) ## the paper's ablations [TABLE=table2|table3|figure5|locality|variants|continued SCALE=small|paper SEEDS=n ARGS='--dry-run …']
	@$(PY) -m tools.paper $(if $(TABLE),"$$TABLE",all) $(if $(SCALE),--scale "$$SCALE") $(if $(SEEDS),--seeds "$$SEEDS") $(ARGS)

eval: ready ## RUN=runs/…: k-NN and linear segmentation of a run, beside the same network untrained
	@$(PY) -m eval report "$$RUN" $(ARGS)
	@$(PY) -m eval html "$$RUN"

features: ready ## RUN=runs/… SRC=photos|shards OUT=folder [ARGS='--points FILE --neighbors …']: features of photos, as files
	$(call need,SRC,a folder of photos or a list of them or shards)$(call need,OUT,the folder to write)
	@$(PY) -m eval embed "$$RUN" "$$SRC" "$$OUT" $(ARGS)

export: ready ## RUN=runs/… DST=folder [TO=transformers,torch,onnx,card|all]: the backbone for timm, transformers, torch.export and ONNX
	$(call need,DST,the folder to write)
	@$(PY) -m tools.export "$$RUN" "$$DST" $(if $(TO),--to "$$TO") $(ARGS)

# WHAT=step with several GPUS measures the scaling of training
measured = $(if $(and $(GPUS),$(filter step,$(WHAT))),scale,$(WHAT))

bench: ready $(if $(SHARDS)$(SRC),,$(if $(filter data all scale leak shards features online,$(measured)),scenes)) ## WHAT=data|all|step|leak|plan|knn|checkpoint|resume|ranks|features|gpu_code|shards|locality|online [METHODS=all or GPUS=n with step, SHARDS=…, SRC=… with shards, OUT=rows.jsonl]: images per second
	@$(PY) -m tools.bench $(call quote,$(measured)) $(if $(GPUS),"$$GPUS") $(if $(METHODS),--methods "$$METHODS") $(if $(SHARDS),--shards "$$SHARDS") \
	  $(if $(SRC),--src "$$SRC") $(if $(filter CONFIG,$(given)),--config "$$CONFIG") $(if $(OUT),--out "$$OUT") $(ARGS)

gpu: ready ## the first minutes on a GPU: is all right, how fast is it? [SHARDS=… OUT=rows.jsonl ARGS='--parts speed --tiny']
	@$(PY) -m tools.gpu $(if $(SHARDS),--shards "$$SHARDS") $(if $(OUT),--out "$$OUT") $(ARGS)

test: ready ## the tests, on any machine (some minutes)
	@$(PY) -m pytest -n 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: ready ## the tests that take minutes (compilation, benchmark rows, compiled training on two processes)
	@$(PY) -m pytest -n 2 -m slow $(ARGS)

faults: ready ## all 681 sub-cases of the fault plan (about 10 minutes)
	@FAULTS=all $(PY) -m pytest tests/faults -n 2 --dist worksteal $(ARGS)

check: ready ## ruff and mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

lock: ready # write requirements.lock from pyproject.toml
	@$(PY) -m uv pip compile pyproject.toml --extra dev --extra dali13 --extra remote --extra onnx --universal --python-version 3.11 \
	  --generate-hashes --quiet --no-header -o requirements.lock

docs-reference: ready # write docs/reference/config.md and configs/schema.json from runtime/config/schema.py
	@$(PY) -m runtime.config.reference

# not --quiet: it would make dead links no errors
docs: .venv-docs/.ready ## the documentation as a site: site/index.html
	@NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build $(ARGS)
	@echo site/index.html

# an environment of its own: what makes the site is no part of the trainer
.venv-docs/.ready: pyproject.toml
	@$(PYTHON) -m venv .venv-docs
	@.venv-docs/bin/python -m pip install --quiet --upgrade pip
	@.venv-docs/bin/python -m pip install --quiet --group docs
	@touch $@

clean: ## remove caches (runs, data and .venv are kept)
	rm -rf site .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
