# make quickstart   environment, dependencies, then the whole path on the bundled synthetic catalogue
# make test         environment, dependencies, then lint and tests
# make lint         ruff and the type checker alone
# make fuzz         the property tests on new random examples, and every reader on damaged files (an hour)
# make faults       kills, full disks and the like for every stage, at every change of a file (two hours)
# make compat       the suite on Python 3.11 and 3.13, with the oldest allowed and the newest transformers, peft,
#                   accelerate and datasets (torch for 3.13 takes several GB); PYTHONS=python3.12 picks others
# make settings     docs/settings.md from the docstrings
# make sample_card  docs/sample_card/README.md from its record, after a change of a template
# PYTHON=python3.12 make test   picks the interpreter that .venv is made from
# WORKERS=4 make test           runs the tests in four processes of one thread each, instead of two

PYTHON ?= python3
PYTHONS ?= python3.11 python3.13
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
TYPED := $(VENV)/typed

.PHONY: quickstart test lint settings sample_card fuzz faults compat clean

quickstart: $(INSTALLED)
	$(BIN)/mmesid run examples/recipes/quickstart.yaml

test: lint
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

lint: $(INSTALLED) $(TYPED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=$(TYPED) $(BIN)/mypy -p mmesid -p modeling_mmesid

fuzz: $(INSTALLED)
	HF_HUB_OFFLINE=1 HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest -m hypothesis
	$(BIN)/python tests/harness/fuzz.py

faults: $(INSTALLED)
	$(BIN)/python tests/harness/faults.py

compat:
	$(PYTHON) tests/harness/compat.py --pythons $(PYTHONS) --pytest -n $(WORKERS) --dist worksteal

# The folders under the names that they are installed by, for the type checker does not follow editable installs.
$(TYPED): Makefile | $(INSTALLED)
	@rm -rf $@ && mkdir -p $@/mmesid
	@ln -s $(CURDIR)/modeling_mmesid $@/modeling_mmesid
	@ln -s $(addprefix $(CURDIR)/,mmesid/__init__.py mmesid/py.typed trainer hub_cards) $@/mmesid

# torch goes first and under its pin: the resolver never sees a newer build and never downloads two.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "mmesid needs Python 3.11 or newer, and '$(PYTHON)' is not; name one with PYTHON=python3.11 make ..." >&2; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) (some minutes the first time)"
	@$(PIP) install torch -c constraints.txt
	@$(PIP) install -e '.[quickstart,test]' -c constraints.txt
	@touch $@

settings: $(INSTALLED)
	@$(BIN)/python -c "from mmesid.trainer.cli import STAGES; from mmesid.trainer.running.help import settings_page; \
		print(settings_page(STAGES), end='')" > docs/settings.md.partial
	@mv docs/settings.md.partial docs/settings.md

sample_card: $(INSTALLED)
	@$(BIN)/python -c "import json; from mmesid.hub_cards import REPOSITORY, render_card; \
		record = json.load(open('docs/sample_card/record.json', encoding='utf-8')); \
		print(render_card(record).replace(REPOSITORY, 'your-name/mmesid-beauty'), end='')" > docs/sample_card/README.md

clean:
	rm -rf $(VENV) .venv-compat build dist *.egg-info
