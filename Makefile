# `make demo` shows the bus at work, `make check` tests it; both set up what they need first.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: build
build: $(VENV)/.installed
	@flock .build.lock $(BIN)/python setup.py -q build_ext --inplace

# kbusd, dbus-daemon and dbus-broker side by side: make bench BENCH="--quick --only round-trip"
.PHONY: bench
bench: build
	@$(BIN)/python tests/bench/run.py $(BENCH)

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	touch $@
