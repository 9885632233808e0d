# Two commands set everything up on a fresh Debian or Ubuntu machine:
#   make quickstart   trains four specialists, merges them, writes the report
#   make test         runs the test suite
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.installed

.PHONY: quickstart test lint system clean

quickstart: $(STAMP) system
	$(VENV)/bin/posttrain run quickstart --run-dir runs/quickstart --resume

test: $(STAMP) system
	scripts/prepare-sandboxes $(PYTHON)
	$(PYTHON) -m pytest

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(STAMP): pyproject.toml constraints.txt
	scripts/install $(VENV)
	touch $(STAMP)

system:
	scripts/system-packages

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache
