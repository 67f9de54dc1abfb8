# One command for each thing a developer does. The environment is whatever python is active.
PYTHON ?= python

.PHONY: check lint types unit test compat benchmark

check: lint types unit

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

unit:  ## under a minute: neither torch nor an engine
	$(PYTHON) -m pytest -n logical --maxprocesses 4 --dist loadfile -m "not e2e and not heavy"

test:  ## everything, with the real trainer and engine on the CPU
	$(PYTHON) -m pytest

compat:  ## recipes and version tables against the released wheels of verl 0.7 to 0.9 (downloads them through pip)
	MEDR1_COMPAT=1 $(PYTHON) -m pytest tests/compat
