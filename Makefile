# `make demo` shows the bus at work, `make check` tests it; both set up what they need first.
# On a fresh Debian 12, as root or with sudo; nothing outside this tree is changed but packages.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
BUILD_PACKAGES := python3-venv python3-dev gcc libc6-dev libcap-dev libseccomp2
DEMO_PACKAGES := dbus-bin libglib2.0-bin
TEST_PACKAGES := $(shell sed -n 's/^\([a-z0-9][^ \#]*\).*/\1/p' tests/apt-packages.txt 2>/dev/null)
BENCH_PACKAGES := dbus-daemon dbus-broker
PYTEST := $(BIN)/python -m pytest

.PHONY: all setup build demo run check check-all lint bench clean

all: build

# Installs only what is missing, so that a machine without a network but with the packages works.
define install
	@missing=$$(for each in $(1); do dpkg -s $$each 2>/dev/null | grep -q '^Status: install ok' || echo $$each; done); \
	if [ -n "$$missing" ]; then \
	  $(SUDO) apt-get update -qq && \
	  DEBIAN_FRONTEND=noninteractive $(SUDO) apt-get install -y -qq --no-install-recommends $$missing; \
	fi
endef

$(VENV)/.installed: pyproject.toml
	$(call install,$(BUILD_PACKAGES))
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "setuptools>=77" wheel "Cython>=3.0.11,<3.3"
	$(BIN)/pip install -q --no-build-isolation -e ".[test,dev]"
	touch $@

setup: $(VENV)/.installed

build: setup
	@flock .build.lock $(BIN)/python -W ignore setup.py -q build_ext --inplace

demo: build
	$(call install,$(DEMO_PACKAGES))
	$(BIN)/python -m tests.demo

run: build
	$(BIN)/kbusd --session --nofork --print-address

lint: build
	$(BIN)/ruff format --check kbusd tests
	$(BIN)/ruff check kbusd tests
	$(BIN)/mypy

check: lint
	$(call install,$(TEST_PACKAGES))
	$(PYTEST) tests -m "not slow"

check-all: lint
	$(call install,$(TEST_PACKAGES))
	$(PYTEST) tests

bench: build
	$(call install,$(BENCH_PACKAGES))
	$(BIN)/python tests/bench/run.py $(BENCH)

clean:
	rm -rf build $(VENV) .build.lock
	find kbusd -name '*.so' -delete
