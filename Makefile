# Two commands matter on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 2

.PHONY: demo test lint slow bench bench-exact bench-inverse bench-mcmc bench-meta bench-paths bench-vi clean

.venv/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: .venv/.installed
	$(BIN)/pilotlight demo --output demo

lint: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# One thread for each of two workers: the tests are small, and two threads on two busy cores wait for each other.
test: export OMP_NUM_THREADS = 1
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

slow: .venv/.installed
	$(BIN)/python -m pytest -m slow

bench: .venv/.installed
	$(BIN)/python -m benchmarks

bench-exact: .venv/.installed
	$(BIN)/python -m benchmarks.exact

# The peers bring packages of their own, so they get an environment of their own. torchvision is the one for torch 2.13.
.venv-bench/.installed: pyproject.toml constraints.txt
	test -x .venv-bench/bin/python || $(PYTHON) -m venv .venv-bench
	.venv-bench/bin/python -m pip install --quiet --constraint constraints.txt --editable . \
		torch==2.13.0 torchvision==0.28.0 'deepinv==0.5.*' 'azula==0.11.*'
	touch $@

# Hours. Results go to runs/inverse.jsonl, and a second call goes on where the first stopped.
bench-inverse: export OMP_NUM_THREADS = 1
bench-inverse: .venv-bench/.installed
	.venv-bench/bin/python -m benchmarks.inverse
	.venv-bench/bin/python -m benchmarks.inverse --speed

# NumPyro brings jax, so it gets an environment of its own too; pytest because the models are those of a test.
.venv-mcmc/.installed: pyproject.toml constraints.txt
	test -x .venv-mcmc/bin/python || $(PYTHON) -m venv .venv-mcmc
	.venv-mcmc/bin/python -m pip install --quiet --constraint constraints.txt --editable . torch==2.13.0 pytest 'numpyro==0.22.*'
	touch $@

# Results go to runs/mcmc.jsonl, and a second call goes on where the first stopped.
bench-mcmc: export OMP_NUM_THREADS = 1
bench-mcmc: .venv-mcmc/.installed
	.venv-mcmc/bin/python -m benchmarks.mcmc
	.venv-mcmc/bin/python -m benchmarks.mcmc --chains-cost

# Results go to runs/meta.jsonl; `python -m benchmarks.meta --quick` takes minutes.
bench-meta: export OMP_NUM_THREADS = 1
bench-meta: .venv/.installed
	$(BIN)/python -m benchmarks.meta

# diffrax brings jax as well.
.venv-paths/.installed: pyproject.toml constraints.txt
	test -x .venv-paths/bin/python || $(PYTHON) -m venv .venv-paths
	.venv-paths/bin/python -m pip install --quiet --constraint constraints.txt --editable . torch==2.13.0 'diffrax==0.7.*'
	touch $@

bench-paths: export OMP_NUM_THREADS = 1
bench-paths: .venv-paths/.installed
	.venv-paths/bin/python -m benchmarks.paths
	.venv-paths/bin/python -m benchmarks.paths --long

# Results go to runs/vi.jsonl.
bench-vi: export OMP_NUM_THREADS = 1
bench-vi: .venv/.installed
	$(BIN)/python -m benchmarks.vi

clean:
	rm -rf .venv .venv-bench .venv-paths build dist *.egg-info demo
