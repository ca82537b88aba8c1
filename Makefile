# One talking-avatar video for every recording in batch/.   make help   says what else there is.
# For GNU Make 3.81, as macOS has it, and newer. The key stays out of here: the program reads it
# from the environment or from .env, where no recipe shows it and no `ps` either.

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := all
.PHONY: all odd-names help run watch credits demo sandbox ffmpeg bench install lint test clean

#: IN=batch       folder of the recordings
#: OUT=output     folder of the videos
#: IMG=face.png   portrait of the clips that have none of their own (run: of the clip)
#: ARGS='...'     passed on to the program, as in  make ARGS='--resolution 720p'
#: PYTHON=...     a Python to use as it is (else that of .venv, where there is one, or python3)
#: RUNNER='...'   put before the command of each clip, as in  make -j64 RUNNER='srun -n1 -Q'
IN ?= batch
OUT ?= output
ifneq ($(words $(IN) $(OUT)),2)
$(error make cannot take a folder with a blank in its name: use `python hedra_avatar.py batch`)
endif

# To the program IMG is FRIEND_IMG, the fallback, so that a clip's own portrait wins.
ifneq ($(IMG),)
export FRIEND_IMG := $(IMG)
endif

# Without a PYTHON of yours, .venv is made by the targets that need packages for development.
# The others never start pip, which is nothing for a cron job, but say what to install.
ifndef PYTHON
PYTHON := $(or $(wildcard .venv/bin/python),python3)
demo sandbox bench lint test ffmpeg: PYTHON := .venv/bin/python
install demo sandbox bench lint test ffmpeg: .venv/.ready
demo sandbox: ffmpeg
else
install: ; $(PYTHON) -m pip install -r requirements.txt
endif

# File names are data: one that would break a rule (a blank splits it, a `;` starts a recipe) is
# left to `batch`. `-m` runs the byte-compiled module; a script would be compiled at every start.
hash := \#
quote = '$(subst ','\'',$1)'
special = $(strip $(foreach c,: ; | = % * ? [ \ $(hash),$(findstring $c,$1)))
plain = $(wildcard $(foreach f,$1,$(if $(call special,$f),,$f)))
beside = $(filter $(VIDEOS),$(patsubst $(IN)/%.$1,$(OUT)/%.mp4,$(wildcard $(IN)/*.$1)))
HEDRA = $(PYTHON) -m hedra_avatar
FOUND := $(filter-out $(IN)/~%,$(wildcard $(IN)/*.[Ww][Aa][Vv]))
WAVS := $(sort $(call plain,$(filter $(IN)/%.wav,$(FOUND))))
VIDEOS := $(WAVS:$(IN)/%.wav=$(OUT)/%.mp4)
ODD := $(filter-out $(WAVS),$(FOUND))
OWN := $(foreach kind,png jpg jpeg webp,$(call beside,$(kind)))

all: $(if $(ODD),odd-names) $(VIDEOS) ## a video in output/ for each recording in batch/ (make -j4)
	$(if $(FOUND),,@echo '$(IN)/ is empty: put x.wav and its portrait x.png there, or give one portrait as IMG=face.png')
odd-names: ; $(warning make cannot take these names, `$(HEDRA) batch` can: $(ODD))

# The script is no prerequisite: correcting a typo in it must not bill a folder again.
$(OUT)/%.mp4: $(IN)/%.wav
	$(RUNNER) $(HEDRA) run --wav $(call quote,$<) --out $(call quote,$@) $(ARGS)
# Besides, a video depends on the portrait and the prompt of its clip, where they exist.
$(call beside,png): $(OUT)/%.mp4: $(IN)/%.png
$(call beside,jpg): $(OUT)/%.mp4: $(IN)/%.jpg
$(call beside,jpeg): $(OUT)/%.mp4: $(IN)/%.jpeg
$(call beside,webp): $(OUT)/%.mp4: $(IN)/%.webp
$(call beside,txt): $(OUT)/%.mp4: $(IN)/%.txt
$(filter-out $(OWN),$(VIDEOS)): $(call plain,$(or $(IMG),$(FRIEND_IMG)))

help: ## this list
	@awk -F ':.*## ' '/^#: / { print "  " substr($$0, 4) } \
	  /^[a-z][a-z-]*:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' \
	  $(firstword $(MAKEFILE_LIST))
run: ## one clip: make run WAV=hello.wav IMG=friend.png
	$(if $(WAV),,$(error which recording? make run WAV=hello.wav IMG=friend.png))
	$(HEDRA) run --wav $(call quote,$(WAV)) $(if $(IMG),--img $(call quote,$(IMG))) \
	  --out-dir $(call quote,$(OUT)) $(ARGS)
watch: ## make a clip of whatever is put into incoming/, until Ctrl-C
	$(HEDRA) watch --out-dir $(call quote,$(OUT)) $(ARGS)
credits: ## what the account can spend
	$(HEDRA) credits $(ARGS)
demo: ## an avatar of a sample, without a key (API=v3: by the other API; API=both)
	$(PYTHON) sandbox.py demo $(if $(API),--api $(API)) --out-dir $(call quote,$(OUT)) $(ARGS)
sandbox: ## Hedra on this machine, for trying things out: no key, no credits
	$(PYTHON) sandbox.py $(ARGS)
ffmpeg:
	@command -v ffmpeg >/dev/null || $(PYTHON) -c 'import imageio_ffmpeg' 2>/dev/null || \
	  $(PYTHON) -m pip install -q imageio-ffmpeg

bench: ## what the program costs beside its floors, in three minutes, without a key
	@$(PYTHON) -c 'import requests' 2>/dev/null || $(PYTHON) -m pip install -q requests || \
	  echo 'without requests one row of the table stays empty' >&2
	$(PYTHON) sandbox.py bench $(ARGS)

install: ## the packages, in .venv (with PYTHON=... in that Python)
.venv/bin/python:
	@for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	  $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	  echo "$$python -m venv .venv"; $$python -m venv .venv && exit; rm -rf .venv; \
	  echo "$$python has no working venv (on Debian: apt install python3-venv)" >&2; exit 1; \
	done; echo 'Python 3.11 or newer is needed, and none is on the PATH: see python.org' >&2; exit 1
.venv/.ready: requirements.txt .venv/bin/python
	.venv/bin/python -m pip install -q -r requirements.txt
	@touch $@
lint: ## ruff, and mypy --strict
	$(PYTHON) -m ruff check .
	$(PYTHON) -m mypy --strict hedra_avatar.py sandbox.py
# Tests call make themselves: what this call was given is not meant for those.
test: ## pytest; one test: make test ARGS='-k balance'
	@unset MAKEFLAGS ARGS; set -x; $(PYTHON) -m pytest -q $(ARGS)
clean: ## remove .venv and the tools' caches; videos and the ledger (.cache) stay
	rm -rf .venv __pycache__ .pytest_cache .mypy_cache .ruff_cache
