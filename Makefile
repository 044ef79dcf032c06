# make run     train the captioner and show it; ARGS="--epochs 3" passes options to the script
# make test    style check and tests, in two processes; WORKERS=8 makes it eight
# make soak    what takes longer than tests may: 20 kills and 20 signals (KILLS=100 makes it 100 of each), memory over
#              thousands of steps, 30 minutes of damaged files
# make bench   the benchmarks of the CPU set, to benchmarks/RESULTS.md: half an hour on a machine that does nothing else
# make clean   remove .venv and the rendered Shapes
# Both make .venv and install the requirements the first time (torch brings several GB of CUDA packages on Linux).

PYTHON ?= python3
WORKERS ?= 2
KILLS ?= 20
SCRIPT = MyLLM_Vit_gpt2_captioning/MyLLM_Vit_gpt2_captioning.py

.PHONY: run test soak bench clean

run: .venv/run-installed
	.venv/bin/python $(SCRIPT) $(ARGS)

test: .venv/test-installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -m pytest -n $(WORKERS) --dist loadscope --no-loadscope-reorder

soak: .venv/test-installed
	SOAK=1 KILLS=$(KILLS) .venv/bin/python -m pytest -s -k "killed_at_random or memory_stays_flat" tests/training/test_resume.py
	SOAK=1 .venv/bin/python -m pytest tests/test_check_gpu.py tests/decoding/test_fake_gpu.py
	.venv/bin/python tests/fuzz.py --minutes 30

bench: .venv/run-installed
	.venv/bin/python benchmarks/run_all.py $(ARGS)

clean:
	rm -rf .venv data/shapes

.venv/bin/python:
	$(PYTHON) -m venv .venv

# The stamp is written last, so that an interrupted install is taken up again.
.venv/run-installed: requirements.txt | .venv/bin/python
	.venv/bin/python -m pip install -r requirements.txt
	touch $@

.venv/test-installed: requirements-dev.txt requirements-extra.txt .venv/run-installed
	.venv/bin/python -m pip install -r requirements-dev.txt
	touch $@
