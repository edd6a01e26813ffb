# `make demo` and `make test` work as the first command after a clone, with python3, make and a PyPI client.
PYTHON ?= python3
VENV ?= .venv
RUN = JAX_PLATFORMS=cpu $(VENV)/bin/python

# Four workers fill two cores while some wait; each has two threads for the eight devices that it simulates.
PYTEST = OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false JAX_PLATFORMS=cpu $(VENV)/bin/python -m pytest -n 4 --dist worksteal

.PHONY: demo align test test-fast sweep lint tiny clean

demo: $(VENV)/installed
	$(RUN) -m omnifusion_jax.train --config=configs/tiny.py:pretrain --workdir=runs/tiny/pretrain
	$(RUN) -m omnifusion_jax.train --config=configs/tiny.py:sft --config.init_from=runs/tiny/pretrain/model --workdir=runs/tiny

# A model that names what is not there is taught better from pairs of answers (docs/alignment.md)
align: $(VENV)/installed
	$(RUN) examples/align.py runs/align

test: $(VENV)/installed-test lint
	$(PYTEST) --durations=15

# What takes too long for every change: more plans of 7B models, and runs that are killed twenty times
sweep: $(VENV)/installed-test
	$(subst -n 4,-n 1,$(PYTEST)) -m sweep --durations=15

# What a change most likely breaks, of every room, within two minutes
FAST = $(addprefix tests/, nn parity/test_forward.py data/test_layout.py data/test_images.py data/test_sources.py data/test_check.py \
	training/test_loss.py training/test_verdict.py training/test_monitor.py training/test_resume.py training/test_freeze_and_optimizer.py \
	inference/test_processors.py inference/test_search.py inference/test_streaming.py inference/test_fingerprint.py checkpoints/mapping/test_tensors.py checkpoints/storage/test_weights.py \
	checkpoints/storage/test_lazy_array.py checkpoints/storage/test_staging.py checkpoints/storage/test_hub.py test_configs.py test_fields.py test_sharding.py)
test-fast: $(VENV)/installed-test lint
	$(PYTEST) --durations=5 $(FAST)

lint: $(VENV)/installed-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The bundled models again, from nothing: tokenizer, encoder, decoder, both phases (docs/tiny.md says how long, and what came out)
tiny: $(VENV)/installed
	$(RUN) examples/make_tiny.py runs/bundle

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/pip install -q -e .
	touch $@

$(VENV)/installed-test: $(VENV)/bin/python pyproject.toml
	$(VENV)/bin/pip install -q torch==2.13.0
	$(VENV)/bin/pip install -q -e ".[test]"
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) runs
