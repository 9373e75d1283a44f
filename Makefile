# `make demo` shows the bus at work, `make check` tests it; both set up what they need first.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: build
build: $(VENV)/.installed
	@flock .build.lock $(BIN)/python setup.py -q build_ext --inplace

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@
