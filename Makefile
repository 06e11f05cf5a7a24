# `make run` and `make test` do all the set-up themselves, on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

# A half-made environment must not look finished to the next call.
.DELETE_ON_ERROR:
.PHONY: run test test-gpu lint bench screenshots record space chromium clean

run: $(VENV)/.installed            ## start the page and print its address
	$(BIN)/python app.py $(ARGS)

test: $(VENV)/.installed-dev chromium  ## everything that needs no GPU
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -m "not gpu" $(ARGS)

test-gpu: $(VENV)/.installed-dev   ## what needs an NVIDIA GPU
	$(BIN)/python -m pytest -m gpu $(ARGS)

lint: $(VENV)/.installed-dev       ## mend what can be mended, report the rest
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed-dev      ## the tables of the README, saved under benchmarks/results
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-bench.txt
	$(BIN)/python -m benchmarks.run $(ARGS)

record: $(VENV)/.installed         ## the recorded runs that the page paints first
	$(BIN)/python -m kvlens.ui.record $(ARGS)

screenshots: $(VENV)/.installed-dev chromium  ## the pictures of the README, from the running app
	$(BIN)/python -m tools.screenshots $(ARGS)

# The weights and pictures are binary files, which the Hub takes by its own upload and refuses from a plain git push.
space: $(VENV)/.installed          ## the committed state to the Space SPACE=you/name, made if there is none
	@test -n "$(SPACE)" || { echo "say which Space: make space SPACE=you/name (after $(BIN)/hf auth login)"; exit 2; }
	rm -rf build/space && mkdir -p build/space && git archive HEAD | tar -x -C build/space
	$(BIN)/hf repos create $(SPACE) --type space --space-sdk gradio --exist-ok
	$(BIN)/hf upload $(SPACE) build/space . --type space --delete "*"

# A browser is a package of the system. Without one the browser tests are skipped and say so.
chromium:
	@command -v chromium chromium-browser google-chrome >/dev/null 2>&1 || { \
	  echo "installing Chromium for the browser tests"; \
	  apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } 2>/dev/null || \
	  echo "no Chromium here and none could be installed: the browser tests will be skipped"

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: requirements.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-dev: requirements-dev.txt requirements.txt | $(VENV)/bin/pip
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) build *.egg-info
