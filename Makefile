# make demo and make test each stand alone: they make .venv, install, and run.
PYTHON ?= python3
PY := .venv/bin/python
WORKERS ?= 2

.PHONY: demo demo-study demo-penalties demo-ranks test test-rest test-quick fuzz matrix oldest sweep sweep-foreign bench gpu drawings rivals study zoo zoo-libraries suites rng-battery lint clean beside docs site

# .venv/.NAME: the environment with the extra NAME, and with those that EXTRAS_NAME names.
EXTRAS_lint := test,lint
EXTRAS_gpu := test,gpu
EXTRAS_docs := test,docs
EXTRAS_sweep := test,sweep
.venv/.%: pyproject.toml
	@$(PYTHON) .ci/install '.[$(or $(EXTRAS_$*),$*)]' $(THEN)
	@touch $@

# THEN: what follows the installation, and its seconds, so that the estimate is of both.
demo: THEN := --then 60 'the demo'
demo: .venv/.demo
	$(PY) examples/demo.py

# Part 1 of the demo at length: ten seeds, and the strengths are chosen.
demo-study: THEN := --then 180 'the study'
demo-study: .venv/.demo
	$(PY) examples/demo.py --study

demo-penalties: THEN := --then 120 'the demo'
demo-penalties: .venv/.demo
	$(PY) examples/demo_penalties.py

# Two processes train a sharded model; one is killed, both resume from the last checkpoint, and the losses are compared.
demo-ranks: THEN := --then 60 'the demo'
demo-ranks: .venv/.demo
	$(PY) examples/demo_ranks.py

# Several processes import the same files; where the environment forbids to write compiled ones, each would compile all of them.
test: export PYTHONDONTWRITEBYTECODE =
test: THEN := --then 400 'the tests'
test: .venv/.test
	@echo "About 6,900 tests in $(WORKERS) processes: four to seven minutes on two cores, depending on the server."
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal

# What is around the engine (pages and their examples, the page in a browser, tools that measure), and what needs processes of its own, such
# as ranks: tests/slow.py lists it. .ci/run runs both, one after the other. Five minutes.
test-rest: export PYTHONDONTWRITEBYTECODE =
test-rest: THEN := --then 300 'the other tests'
test-rest: .venv/.test
	@echo "What make test leaves to .ci/run: about 1,600 tests in $(WORKERS) processes, five minutes on two cores."
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m rest

# The first case of each test, without what compiles real models or starts processes: while one works, in 90 seconds.
test-quick: export PYTHONDONTWRITEBYTECODE =
test-quick: THEN := --then 90 'the tests'
test-quick: .venv/.test
	@echo "The first case of each test, without what is slow: about 1,600 tests in $(WORKERS) processes, 90 seconds on two cores that are idle."
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal --quick

# The documentation as a site: build/site/index.html, which needs no network. A warning, a dead link, or an example on a page of the README,
# the tutorials and the how-tos that prints something else fails it. make site: without running the examples.
docs: site
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m "not gpu" tests/test_site.py tests/test_readme.py tests/test_guides.py

site: .venv/.docs
	$(PY) -m sphinx -E -q -W --keep-going -b html -c docs -d build/doctrees . build/site
	$(PY) docs/check_site.py build/site

# Random models and regularizers against an instrumented copy of the model; see docs/fuzz.md.
# make fuzz ARGS="--seed 17 --cases 10000"; --compiled aot_eager, --inject all --seeds 3, --replay FILE. Without ARGS
# also the hypothesis tests of the suite, on random examples.
PROPERTIES := $(addprefix tests/, ir/test_selector.py rng/test_noise.py regularizer/test_lengths.py rewriting/test_check.py \
	pipeline/test_bad_input.py ir/test_screen.py)
fuzz: .venv/.test
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) -m fuzz --workers $(WORKERS) $(ARGS)
	$(if $(ARGS),,OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --hypothesis-profile=random $(PROPERTIES))

# The tests with the oldest torch that they pass with, in an environment of its own. PyPI has it as a CUDA build: 7 GB on disk.
OLDEST := torch==2.10.0 torchvision==0.25.0
oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check $(OLDEST) -e '.[test]'
	OMP_NUM_THREADS=1 CUDA_VISIBLE_DEVICES= .venv-oldest/bin/python -m pytest -n $(WORKERS) --dist worksteal -m "not sweep and not gpu"

# The tests, the names of twenty models and the streams under each pair of Python and torch, each in an environment of its own; it
# writes docs/versions.md, and goes on where it was stopped. make matrix ONLY="3.13 2.15": one pair. An hour and 8 GB of disk for each.
matrix:
	PYTHONPATH=benchmarks $(PYTHON) -m matrix --workers $(WORKERS) $(if $(ONLY),--only "$(ONLY)") $(ARGS)

# The whole of what the tests sample: every setting under Inductor, every site compiled alone. About an hour.
# It writes docs/sameness.md, also when a cell of it fails. Then cases from generators that others wrote: 500 of NNSmith's random models,
# and random settings of Inductor; see docs/fuzz.md. These go on where they were stopped, and else take a new seed. make sweep-foreign
# ARGS="--seed 17 --only 3": this model alone, with its source.
sweep: .venv/.sweep
	rm -rf build/sameness
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS) --dist worksteal -m sweep; code=$$?; $(PY) tests/pipeline/sameness_page.py || code=1; \
	$(MAKE) sweep-foreign && exit $$code

sweep-foreign: .venv/.sweep
	OMP_NUM_THREADS=1 PYTHONPATH=tests $(PY) -m foreign --workers $(WORKERS) $(ARGS)

# Hours of a machine that does nothing else. make bench ARGS="--only steps cost": these parts anew. With other processes running it
# measures nothing and writes no page, unless ARGS=--anyway, and then the page says so.
bench: .venv/.bench
	$(PY) benchmarks/bench.py $(ARGS)

# The tests and the benchmark that need a GPU: build/gpu.json; see docs/gpu.md. 25 minutes of one GPU; goes on where it was stopped. Where
# torch finds none, it says so and ends. It needs a build of torch for CUDA.
gpu: .venv/.gpu
	PYTHONPATH=benchmarks $(PY) benchmarks/gpu.py $(ARGS)

# The pictures of the README, docs/drawing.md and docs/page.md; the last where Chromium is found.
drawings: .venv/.test
	$(PY) examples/drawings.py

# docs/beside.md: the drawings of torchview and torchinfo beside graphreg's, in an environment of its own.
BESIDE := torchview==0.2.7 torchinfo==1.8.0 transformers
beside:
	test -x .venv-beside/bin/python || $(PYTHON) -m venv .venv-beside
	.venv-beside/bin/python -m pip install --quiet --disable-pip-version-check $(BESIDE) -e '.[demo]'
	.venv-beside/bin/python benchmarks/beside.py

# The table of docs/randomness.md, measured anew, in an environment of its own with the rivals' versions. Five minutes.
RIVALS := keras==3.15.1 jax==0.10.2 flax==0.12.8
rivals:
	test -x .venv-rivals/bin/python || $(PYTHON) -m venv .venv-rivals
	.venv-rivals/bin/python -m pip install --quiet --disable-pip-version-check $(RIVALS) -e .
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks .venv-rivals/bin/python -m rivals

# Whether the regularizers show what their papers claim, on scikit-learn's data: docs/study.md. Half an hour of one core; goes on
# where it was stopped. make study ARGS="--only 'few: *'"; also --fresh: run again.
study: .venv/.demo
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks $(PY) -m study --workers $(WORKERS) $(ARGS)

# Every model of docs/models.md, each in a process of its own; goes on where it was stopped.
# make zoo ARGS="--only 'timm/*' resnet18"; also --failed, --fresh: run again.
zoo: .venv/.zoo
	PYTHONPATH=benchmarks $(PY) -m zoo --workers $(WORKERS) $(ARGS)

# The same for models of other libraries, in an environment of its own: docs/models_other.md. Goes on where it was stopped, as make zoo does.
# make zoo-libraries ARGS="--only 'pyg/*' wwt"; also --failed, --fresh. rtdl asks for torch 1, and runs with torch 2.
LIBRARIES := vit-pytorch x-transformers monai torch-geometric segmentation-models-pytorch pytorchcv diffusers speechbrain stable-baselines3 \
	open-clip-torch rtdl-revisiting-models rtdl-num-embeddings
zoo-libraries:
	test -x .venv-libraries/bin/python || $(PYTHON) -m venv .venv-libraries
	.venv-libraries/bin/python -m pip install --quiet --disable-pip-version-check $(LIBRARIES) -e '.[zoo]'
	.venv-libraries/bin/python -m pip install --quiet --disable-pip-version-check --no-deps rtdl
	@echo "About 360 models in $(WORKERS) processes: about three hours on two cores; what has run is not run again."
	PYTHONPATH=benchmarks .venv-libraries/bin/python -m zoo --models zoo.libraries.models --workers $(WORKERS) \
		--results docs/models_other.jsonl --page docs/models_other.md $(ARGS)
	OMP_NUM_THREADS=1 PYTHONPATH=benchmarks .venv-libraries/bin/python -m zoo.samples

# The tests that timm and transformers have for their own models, on plain models and on models regularized in place, in an environment of
# its own: docs/suites.md. Days of one core, most of them timm's; goes on where it was stopped. make suites ARGS="--only bert 'g*'": these.
# SUITES=FOLDER: has the libraries' sources, timm/ and transformers/; without it they are fetched from PyPI and GitHub.
SUITES_NEEDS := parameterized httpx einops timeout-decorator datasets
suites:
	test -x .venv-suites/bin/python || $(PYTHON) -m venv .venv-suites
	.venv-suites/bin/python -m pip install --quiet --disable-pip-version-check $(SUITES_NEEDS) -e '.[test]'
	PYTHONPATH=benchmarks .venv-suites/bin/python -m suites --workers $(WORKERS) $(if $(SUITES),--sources $(SUITES)) $(ARGS)

# The random streams under every test of dieharder (Debian: apt-get install dieharder), hours of two cores; goes on where it was stopped.
# make rng-battery ARGS=--report: the tables of what has run.
rng-battery: .venv/.demo
	PYTHONPATH=benchmarks $(PY) -m battery --workers $(WORKERS) $(ARGS)

lint: .venv/.lint
	.venv/bin/ruff check .
	sh .ci/types

clean:
	rm -rf .venv .venv-beside .venv-libraries .venv-oldest .venv-rivals .venv-suites build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
