# make demo   train a small teacher, a student alone and a distilled one on generated scenes, in minutes
# make test   run the tests
# make bench  time training steps and their parts beside torchvision's RetinaNet, in minutes
# make gpu    check and measure everything that needs a GPU, in 12 minutes on one
# make soak   run those that take long: a run killed ten times over
# All need only Python 3.10 or newer; they set up .venv on the first call.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench gpu soak lint clean

demo: .venv/installed
	$(BIN)/python scripts/demo.py

test: .venv/installed
	$(BIN)/python -m pytest tests -n auto --maxprocesses 4 --dist worksteal

bench: .venv/installed
	$(BIN)/python scripts/benchmark.py --rounds 3 --eval-images 200

gpu: .venv/installed
	$(BIN)/python scripts/gpu.py

soak: .venv/installed
	$(BIN)/python -m pytest tests -m soak

lint: .venv/installed
	$(BIN)/ruff check .

.venv/installed: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@

clean:
	rm -rf .venv build *.egg-info
