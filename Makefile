# Portway's commands. `make demo` and `make test` install what the machine lacks (tests/setup.sh) and work from a
# clean checkout; the others take what is there.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help

export CARGO_TERM_COLOR ?= auto
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
AGENT_TRIPLE := x86_64-unknown-linux-gnu
# Tests end within seconds each; the real VM takes a minute or two under TCG.
FUZZ_SECONDS ?= 10

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.PHONY: demo
demo: ## boot a VM with Portway as its network and show it (ONCE=1: and end)
	@tests/demo.sh

.PHONY: test
test: setup fmt clippy guest unit docs fuzz-smoke ## everything CI runs, the real VM included

.PHONY: check
check: ## the fast loop: types and lints of what changed
	@cargo clippy --workspace --all-targets --locked

.PHONY: setup
setup: ## install what is missing (as root), or name it
	@tests/setup.sh

.PHONY: fmt
fmt: ## formatting
	@cargo fmt --all --check

.PHONY: clippy
clippy: ## lints, as errors
	@cargo clippy --workspace --all-targets --locked -- -D warnings

.PHONY: guest
guest: ## the guest of the demo and of the VM test
	@tests/guest/build.sh $(TARGET)/guest/demo
	tests/guest/media.sh $(TARGET)/guest/demo $(TARGET)/guest/media

.PHONY: agent
agent: ## the guest agent: one static file of less than 3 MB, target/guest/portway-agent
	@guest-agent/build.sh $(TARGET)/guest/portway-agent

.PHONY: unit
unit: guest ## all tests: unit, simulation, loopback, real VM
	@cargo build --workspace --bins --locked
	export PORTWAY_BIN=$(TARGET)/debug/portway PORTWAY_GUEST=$(TARGET)/guest/demo
	if cargo nextest --version > /dev/null 2>&1; then
	  cargo nextest run --workspace --locked
	  cargo test --workspace --locked --doc --quiet
	else
	  cargo test --workspace --locked
	fi

.PHONY: docs
docs: ## the API's documentation, warnings as errors
	@RUSTDOCFLAGS="-D warnings" cargo doc --workspace --locked --no-deps --document-private-items --quiet

# A target of its own: building cargo-deny from source takes longer than all the rest of `make test`.
.PHONY: deny
deny: ## licences, sources, duplicates and advisories of dependencies (ADVISORIES=need: not without their database)
	@if ! cargo deny --version > /dev/null 2>&1; then
	  if [ "$(NO_DENY)" = 1 ]; then echo "deny: cargo-deny is not installed, and NO_DENY=1: skipped"; exit 0; fi
	  echo "deny: building cargo-deny (some minutes, once)"
	  cargo install --quiet --locked cargo-deny
	fi
	cargo deny --workspace check bans licenses sources
	# The advisories are a git repository of the net, which not every machine of builds reaches: that is said, and is no finding.
	if said=$$(cargo deny --workspace check advisories 2>&1); then
	  echo "advisories ok"
	elif [ "$(ADVISORIES)" != need ] && grep -q 'failed to fetch advisory database' <<< "$$said"; then
	  echo "deny: advisories: NOT LOOKED AT, their database cannot be fetched from here (git clone of RustSec's advisory-db)"
	else
	  echo "$$said" >&2; exit 1
	fi

.PHONY: fuzz-smoke
fuzz-smoke: ## each fuzz target for FUZZ_SECONDS, where a nightly toolchain and cargo-fuzz are
	@if [ ! -e fuzz/Cargo.toml ]; then echo "fuzz: no targets yet: skipped"; exit 0; fi
	if ! cargo +nightly fuzz --version > /dev/null 2>&1; then
	  echo "fuzz: skipped: no nightly toolchain with cargo-fuzz here (rustup toolchain install nightly; cargo install cargo-fuzz)"
	  exit 0
	fi
	for target in $$(cargo +nightly fuzz list); do
	  echo "fuzz: $$target for $(FUZZ_SECONDS) s"
	  cargo +nightly fuzz run "$$target" -- -max_total_time=$(FUZZ_SECONDS) -verbosity=0
	done

.PHONY: fuzz
fuzz: ## as fuzz-smoke, five minutes each
	@$(MAKE) --no-print-directory fuzz-smoke FUZZ_SECONDS=300

# Where `make install` puts things; DESTDIR goes before all of them, for packages.
PREFIX ?= /usr/local
SYSTEMD_USER ?= $(PREFIX)/lib/systemd/user
# Of cargo: `dev` builds in a minute and is no program to install for good.
PROFILE ?= release
# A portway that is built already; without it one is built.
PROGRAM ?=

.PHONY: install
install: ## the program, man pages, completions and a systemd user unit (PREFIX=/usr/local, DESTDIR=)
	@program="$(PROGRAM)"
	if [ -z "$$program" ]; then
	  cargo build --profile $(PROFILE) --locked -p portway
	  program=$(TARGET)/$(if $(filter dev,$(PROFILE)),debug,$(PROFILE))/portway
	fi
	dir() { install -d "$(DESTDIR)$$1"; }
	dir $(PREFIX)/bin; dir $(PREFIX)/share/man/man1; dir $(SYSTEMD_USER)
	dir $(PREFIX)/share/bash-completion/completions; dir $(PREFIX)/share/zsh/site-functions; dir $(PREFIX)/share/fish/vendor_completions.d
	install --strip -m 755 "$$program" "$(DESTDIR)$(PREFIX)/bin/portway"
	"$$program" man --output "$(DESTDIR)$(PREFIX)/share/man/man1"
	"$$program" completions bash > "$(DESTDIR)$(PREFIX)/share/bash-completion/completions/portway"
	"$$program" completions zsh > "$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_portway"
	"$$program" completions fish > "$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/portway.fish"
	sed 's|@PREFIX@|$(PREFIX)|' docs/systemd/portway@.service > "$(DESTDIR)$(SYSTEMD_USER)/portway@.service"
	install -m 644 docs/systemd/portway@.socket "$(DESTDIR)$(SYSTEMD_USER)/portway@.socket"
	echo "installed under $(DESTDIR)$(PREFIX)"

# Which rows of the side-by-side benchmark, rounds of each, and seconds of a measurement.
ROWS ?= *
ROUNDS ?= 3
SECS ?= 2

.PHONY: bench
bench: setup ## portway beside its peers (as root; 40 minutes; ROWS='netns/*' ROUNDS=1 for less)
	@cargo build --release --locked -p portway
	tests/bench/setup-peers.sh $(TARGET)/bench/peers
	python3 tests/bench/compare.py --portway $(TARGET)/release/portway --peers $(TARGET)/bench/peers \
	  --rows '$(ROWS)' --rounds $(ROUNDS) --secs $(SECS) --json $(TARGET)/bench/last.json

# The figure of .ci/unsafe is changed by who adds a block, in the same commit, so that it is seen.
.PHONY: unsafe-count
unsafe-count: ## where unsafe blocks are; fails when there are more than .ci/unsafe says
	@grep -rcE --include='*.rs' 'unsafe (\{|fn|impl|extern)' netstack/src forwarder guest-agent vm-launcher | grep -v ':0$$' | sort
	count=$$(grep -rhE --include='*.rs' 'unsafe (\{|fn|impl|extern)' netstack/src forwarder guest-agent vm-launcher | wc -l)
	known=$$(cat .ci/unsafe)
	echo "$$count of $$known"
	if [ "$$count" -gt "$$known" ]; then echo "unsafe: $$count blocks, and .ci/unsafe says $$known"; exit 1; fi

.PHONY: kills
kills: ## the sidecar killed a hundred times at random moments
	@cargo build --locked -p portway
	PORTWAY_KILLS=100 cargo test --locked -p portway-tests --test faults -- killed

# How long the load lasts; the plot is target/soak/soak.svg.
MINUTES ?= 5
GUESTS ?= 8

.PHONY: soak
soak: ## mixed load of many guests for MINUTES=5; everything has to come back to where it was
	@cargo build --locked --workspace --bins
	PORTWAY_BIN=$(TARGET)/debug/portway $(TARGET)/debug/soak --minutes $(MINUTES) --guests $(GUESTS) --out $(TARGET)/soak

.PHONY: calls
calls: ## the system tests under strace: no call outside of the sandbox's list
	@cargo build --locked --workspace --bins
	PORTWAY_BIN=$(TARGET)/debug/portway tests/calls.sh

# AddressSanitizer of a nightly compiler, on the modules that have unsafe blocks and what stands on them: the sidecar's, the
# guest's agent's and the launcher's.
HOST = $(shell rustc -vV | sed -n 's/host: //p')
.PHONY: sanitize
sanitize: ## unit tests of the unsafe modules under AddressSanitizer (nightly)
	@RUSTFLAGS=-Zsanitizer=address cargo +nightly test --locked --target $(HOST) \
	  -p portway -p portway-launcher -p portway-agent --lib --bin portway-agent -- \
	  rings:: link:: vhost_user:: vsock:: datagrams:: fd:: host uplink sandbox:: \
	  sys:: share:: console:: state:: qemu:: tap:: services:: harden:: expose:: run::

# Miri knows neither devices nor files in memory: what it can run of the modules with unsafe blocks are the rings' memory and what is
# read out of the kernel's messages of many datagrams. Beside them, parsers, for what they stand on has such blocks.
.PHONY: miri
miri: ## unit tests of the unsafe modules that make no system calls under Miri (nightly, with its miri component)
	@MIRIFLAGS="-Zmiri-permissive-provenance -Zmiri-disable-isolation" PROPTEST_CASES=16 \
	  cargo +nightly miri test --locked -p portway --lib -- rings::tests:: datagrams::batch::tests:: vnet:: vsock::device::packet::

.PHONY: bench-flows
bench-flows: ## cost per packet and memory per flow with many flows held
	@cargo bench --workspace --locked
