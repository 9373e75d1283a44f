# `make demo` shows the bus at work, `make check` tests it; both set up what they need first.
# On a fresh Debian 12, as root or with sudo; outside this tree only packages are installed.
# Where the packages are there already, an ordinary user without sudo can do all of it.
PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(shell test "$$(id -u)" = 0 || echo sudo)
BUILD_PACKAGES := python3-venv python3-dev gcc libc6-dev libcap-dev libseccomp2
DEMO_PACKAGES := dbus-bin libglib2.0-bin
RUN_PACKAGES := dbus-session-bus-common
GUEST_PACKAGES := user-mode-linux kmod
BENCH_PACKAGES := gcc libc6-dev dbus-daemon dbus-broker
# One a line, with the reason behind a #.
TEST_PACKAGES := $(shell sed -n 's/^\([a-z0-9][^ \#]*\).*/\1/p' tests/apt-packages.txt)
PYTEST := $(BIN)/python -m pytest

.PHONY: all setup build demo run lint check check-all guest-shell selinux bench clean

all: build

# Installs what is missing and nothing else, so that it needs neither network nor root otherwise.
define install
	@missing=$$(for each in $(1); do \
	  dpkg -s $$each 2>/dev/null | grep -q '^Status: install ok' || echo $$each; done); \
	test -z "$$missing" || { \
	  echo "installing Debian packages:" $$missing; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  $(SUDO) apt-get update -qq && \
	  $(SUDO) apt-get install -y -qq --no-install-recommends $$missing >/dev/null; } || { \
	  echo "could not be installed; as root: apt-get install" $$missing >&2; exit 1; }
endef

$(VENV)/.installed: pyproject.toml
	$(call install,$(BUILD_PACKAGES))
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q "setuptools>=77" wheel "Cython>=3.0.11,<3.3"
	$(BIN)/pip install -q --no-build-isolation -e ".[test,dev]"
	@touch $@

setup: $(VENV)/.installed

build: setup
	@flock .build.lock $(BIN)/python -W ignore setup.py -q build_ext --inplace --parallel "$$(nproc)"

demo: build
	$(call install,$(DEMO_PACKAGES))
	$(BIN)/python -m tests.demo

run: build
	$(call install,$(RUN_PACKAGES))
	$(BIN)/kbusd --session --nofork --print-address

lint: build
	$(BIN)/ruff format --check kbusd tests setup.py
	$(BIN)/ruff check kbusd tests setup.py
	$(BIN)/mypy

# The slow ones, minutes of stress and other projects' suites once more, are left to check-all. The
# guest has one processor, so its tests run beside the others; what they say comes at the end.
check: lint
	$(call install,$(TEST_PACKAGES))
	@log=$$(mktemp); trap 'rm -f $$log' EXIT; \
	$(PYTEST) -m "guest and not slow" >$$log 2>&1 & guest=$$!; \
	$(PYTEST) -m "not guest and not slow"; others=$$?; \
	wait $$guest; guest=$$?; \
	echo "in the guest:"; cat $$log; \
	exit $$((others | guest))

check-all: check
	$(PYTEST) -m slow

# The policy module (docs/selinux.md).
selinux:
	$(call install,selinux-policy-dev)
	$(MAKE) -C selinux all strict

# For instance: make bench BENCH="--quick --only round-trip,fanout"
bench: build
	$(call install,$(BENCH_PACKAGES))
	$(BIN)/python tests/bench/run.py $(BENCH)

clean:
	rm -rf build $(VENV) .build.lock kbusd.egg-info tests/bench/bin
	find kbusd -name '*.so' -delete
