# One command for each thing a developer does. The environment is whatever python is active.
PYTHON ?= python

.PHONY: check lint types unit test benchmark

check: lint types unit

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

unit:  ## under a minute, no engine started
	$(PYTHON) -m pytest -m "not e2e"

test:  ## everything, with the real trainer and engine on the CPU
	$(PYTHON) -m pytest
