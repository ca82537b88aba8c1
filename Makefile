# One talking-avatar video for every recording or text in batch/.   make help   says what else.
# For GNU Make 3.81, as macOS has it, and newer. The key stays out of here: the program reads it
# from the environment or from .env, where no recipe shows it and no `ps` either.

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DEFAULT_GOAL := all
.PHONY: all told help run watch credits voices demo sandbox ffmpeg bench install lint test clean

#: IN=batch       folder of the recordings and texts
#: OUT=output     folder of the videos
#: IMG=face.png   portrait of the clips that have none of their own (run: of the clip)
#: VOICE=Maya     who speaks the texts that have no x.voice.txt of their own
#: ARGS='...'     more flags, as in  make ARGS='--resolution 720p'; they win over files beside x
#: PYTHON=...     a Python to use as it is (else that of .venv, where there is one, or python3)
#: RUNNER='...'   put before the command of each clip, as in  make -j64 RUNNER='srun -n1 -Q'
IN ?= batch
OUT ?= output
# To the program IMG and VOICE are the fallbacks, so that what a clip has of its own wins. A text
# to be said is no make code (`It costs $5`) and may have lines: it goes through the environment.
ifneq ($(IMG),)
export FRIEND_IMG := $(IMG)
endif
ifneq ($(VOICE),)
export HEDRA_VOICE := $(VOICE)
endif
override SAY := $(value SAY)
export SAY

# Without a PYTHON of yours, .venv is made by the targets that need packages for development.
# The others never start pip, which is nothing for a cron job, but say what to install.
ifndef PYTHON
PYTHON := $(or $(wildcard .venv/bin/python),python3)
demo sandbox bench lint test ffmpeg: PYTHON := .venv/bin/python
install demo sandbox bench lint test ffmpeg: .venv/.ready
else
install: ; $(PYTHON) -m pip install -q -r requirements.txt
endif
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# `-m` runs the byte-compiled module; a script would be compiled at every start.
HEDRA = $(PYTHON) -m hedra_avatar

# File names are data: one that would break a rule (a blank splits it, a `;` starts a recipe, what
# follows a line break is a command for 3.81) is left to `batch`, and so is such a folder.
define newline


endef
blank := $(subst ,, )
hash := \#
line = $(subst $(newline),$(blank),$1)
quote = '$(subst ','\'',$(call line,$1))'
special = $(strip $(foreach c,: ; | = % * ? [ \ $(hash),$(findstring $c,$(subst $(newline),|,$1))))
plain = $(sort $(wildcard $(foreach f,$1,$(if $(call special,$f),,$f))))
refuse = $(error $1="$(call line,$($1))": make takes no folder without a name, or with a blank or \
  one of : ; | = % * ? [ \ $(hash) in it; `$(HEDRA) batch` does)
$(foreach v,IN OUT,$(if $(call special,$(subst $(blank),|,$(or $($v),|))),$(call refuse,$v)))

# A recording wins over a text of its name; of two recordings of one name neither is guessed at.
# Endings in upper case are looked for only to be told: `batch` takes them.
KINDS := wav mp3 m4a flac ogg aif aiff
found = $(strip $(foreach e,$1,$(wildcard $(IN)/*.$e)))
video = $(patsubst $(IN)/%$1,$(OUT)/%.mp4,$2)
FOUND := $(call found,[Ww][Aa][Vv] [Mm][Pp]3 [Mm]4[Aa] [Ff][Ll][Aa][Cc] [Oo][Gg][Gg] \
  [Aa][Ii][Ff] [Aa][Ii][Ff][Ff])
TEXTS := $(call found,[Ss][Aa][Yy].[Tt][Xx][Tt])
WAVS := $(call plain,$(filter $(addprefix %.,$(KINDS)),$(FOUND)))
SAYS := $(call plain,$(filter %.say.txt,$(TEXTS)))
NAMES := $(call video,,$(basename $(call plain,$(FOUND))))
TWINS := $(strip $(foreach n,$(sort $(NAMES)),$(if $(word 2,$(filter $n,$(NAMES))),$n)))
VIDEOS := $(filter-out $(TWINS),$(call video,,$(basename $(WAVS)))) \
  $(filter-out $(NAMES),$(call video,.say.txt,$(SAYS)))
ODD := $(filter-out $(WAVS) $(SAYS),$(FOUND) $(TEXTS))
IGNORED := $(call found,3ga 3gp 3gpp aac ac3 aifc amr AMR ape au awb caf m4b m4r mka mp2 oga opus \
  OPUS ra spx tta w64 wave weba webm wma WMA wv)
twice = two recordings of one name in $(IN)/, keep one: $(notdir $(TWINS:.mp4=))

all: told $(VIDEOS) ## a video in output/ for each clip in batch/ (make -j4)
	$(if $(wildcard $(IN)/.),,$(error there is no folder $(IN)))$(if $(TWINS),$(error $(twice)))
	$(if $(FOUND)$(TEXTS),,@echo $(call quote,$(IN)/ $(if $(wildcard $(IN)/*),has no recordings \
	  and no x.say.txt,is empty): put x.wav and its portrait x.png there, or give IMG=face.png))
told:
	$(if $(ODD),$(warning make cannot take these names, `$(HEDRA) batch` can: $(ODD)))
	$(if $(IGNORED),$(warning ignored, for Hedra takes no such recordings: $(IGNORED)))
	$(if $(TWINS),$(warning $(twice)))
$(TWINS): ; $(error $(twice))

# The program writes whole videos or none, and has paid for them: make must never delete one.
.PRECIOUS: $(OUT)/%.mp4 $(VIDEOS)
# The script is no prerequisite: correcting a typo in it must not bill a folder again.
clip = $(RUNNER) $(HEDRA) run $1 --out $(call quote,$@) $(call line,$(ARGS))
define recorded
$$(OUT)/%.mp4: $$(IN)/%.$1
	$$(call clip,--wav $$(call quote,$$<))
endef
$(foreach kind,$(KINDS),$(eval $(call recorded,$(kind))))
$(OUT)/%.mp4: $(IN)/%.say.txt
	$(call clip,--say $(call quote,@$<))
# Besides, a video depends on the portrait, prompt and voice of its clip, where they exist,
beside = $(filter $(VIDEOS),$(foreach e,$1,$(call video,.$e,$(wildcard $(IN)/*.$e))))
depends = $$(call beside,$1): $$(OUT)/%.mp4: $$(IN)/%.$1
IMAGES := png jpg jpeg webp PNG JPG JPEG WEBP
$(foreach kind,$(IMAGES) txt TXT voice.txt,$(eval $(call depends,$(kind))))
$(filter-out $(call beside,$(IMAGES)),$(VIDEOS)): $(call plain,$(FRIEND_IMG))
# and on a stamp that holds the settings and is written when they change: then every clip is asked
# for again, which is free where it is the same. Decided here, so that `make -n` writes nothing.
STAMP := .cache/make/$(subst ..,+,$(OUT))/settings
SETTINGS := $(call line,IN=$(IN) FRIEND_IMG=$(value FRIEND_IMG) HEDRA_VOICE=$(value HEDRA_VOICE) \
  HEDRA_MODEL_ID=$(value HEDRA_MODEL_ID) $(ARGS))
$(VIDEOS): $(STAMP)
ifneq ($(shell cat $(call quote,$(STAMP)) 2>/dev/null),$(SETTINGS))
.PHONY: $(STAMP)
$(STAMP):
	-@mkdir -p $(call quote,$(@D)) && printf '%s\n' $(call quote,$(SETTINGS)) >$(call quote,$@)
endif

help: ## this list
	@awk -F ':.*## ' '/^#: / { print "  " substr($$0, 4) } \
	  /^[a-z][a-z-]*:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' \
	  $(firstword $(MAKEFILE_LIST))
spoken = $(if $(SAY), --say="$$SAY")$(if $(VOICE), --voice $(call quote,$(VOICE)))
into = $(if $(findstring --out,$(ARGS)),,$(blank)--out-dir $(call quote,$(OUT)))
one = $(if $(WAV), --wav $(call quote,$(WAV)))$(spoken)$(if $(IMG), --img $(call quote,$(IMG)))
run: ## one clip: WAV=hello.wav IMG=friend.png, or SAY='Good morning!' VOICE=Maya IMG=friend.png
	$(if $(WAV)$(SAY),,$(error which recording or text? WAV=hello.wav or SAY='Good morning!'))
	$(HEDRA) run$(one)$(into) $(call line,$(ARGS))
watch: ## make a clip of whatever is put into incoming/, until Ctrl-C
	$(HEDRA) watch$(if $(filter command,$(origin IN)), $(call quote,$(IN)))$(into) $(ARGS)
credits: ## what the account can spend (ARGS=--spent: what was spent)
	$(HEDRA) credits $(ARGS)
voices: ## who can speak
	$(HEDRA) voices $(ARGS)
demo: ## an avatar of a sample, without a key (SAY='Hello there', API=v3 or both)
	$(PYTHON) -m sandbox demo$(if $(API), --api $(API))$(spoken)$(into) $(ARGS)
sandbox: ## Hedra on this machine, for trying things out: no key, no credits
	$(PYTHON) -m sandbox serve $(ARGS)
demo sandbox: ffmpeg
ffmpeg:
	@command -v ffmpeg >/dev/null || $(PYTHON) -c 'import imageio_ffmpeg' 2>/dev/null || \
	  $(PYTHON) -m pip install -q imageio-ffmpeg
bench: ## what the program costs beside its floors, in three minutes, without a key
	$(PYTHON) -m sandbox bench $(ARGS)

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
	$(PYTHON) -m mypy --strict hedra_avatar.py sandbox
# Tests call make themselves: what this call was given is not meant for those.
test: ## pytest, on two cores; one test: make test ARGS='-k balance'
	@unset MAKEFLAGS ARGS; set -x; $(if $(ARGS),$(PYTHON) -m pytest -q $(ARGS),\
	  $(PYTHON) -m pytest -q -m second_half & $(PYTHON) -m pytest -q -m 'not second_half'; \
	  status=$$?; wait $$! && exit $$status)
clean: ## remove .venv and the tools' caches; videos and the ledger (.cache) stay
	rm -rf .venv __pycache__ sandbox/__pycache__ .pytest_cache .mypy_cache .ruff_cache
