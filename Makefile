# Blixard's development commands. `make` alone lists them.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
GO ?= go
# Two packages at once: linkers and tests that boot guests need memory and cores.
GOFLAGS ?= -p=2
FUZZTIME ?= 10s
# Tests that boot real guests take their time on few cores.
TESTTIME ?= 20m
TESTFLAGS ?=
# What `make bench` measures, as scripts/bench takes it (make bench-functions:
# scripts/bench-functions); empty: everything.
BENCHFLAGS ?=
# What `make soak` and `make mutants` take.
SOAKFLAGS ?=
MUTANTFLAGS ?=

GOLANGCI_LINT_VERSION := v2.15.0

export GOFLAGS

# Static, without cgo and without paths of the machine it was built on: the same
# tree gives the same bytes.
BUILD := CGO_ENABLED=0 $(GO) build -trimpath -buildvcs=false

.PHONY: help
help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z][a-z-]*:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: build
build: ## build bin/blixard, bin/blixard-guest and bin/blixard-guest-wasm, static and stripped
	@mkdir -p bin
	$(BUILD) -ldflags '-s -w -buildid= -X main.version=$(VERSION)' -o bin/blixard ./cmd/blixard
	$(BUILD) -ldflags '-s -w -buildid=' -o bin/blixard-guest ./cmd/blixard-guest
	$(BUILD) -ldflags '-s -w -buildid=' -o bin/blixard-guest-wasm ./cmd/blixard-guest-wasm

.PHONY: setup
setup: ## install what is missing on this machine (QEMU, a kernel for the guests, …)
	@scripts/setup

.PHONY: demo
demo: setup build ## a 3-node cluster with real microVMs that loses a node; ONCE=1 takes it down again
	@ONCE='$(ONCE)' scripts/demo

.PHONY: test
test: setup build ## all tests, those with real guests and clusters of processes included
	$(GO) test -count=1 -timeout $(TESTTIME) $(TESTFLAGS) ./... # not from the cache, which does not see what programs the tests run

.PHONY: check
check: build ## the quick checks before a commit: build, vet, gofmt, architecture, short tests
	@unformatted=$$(gofmt -l $$(find . -name '*.go' -not -path './.git/*' -not -path './third_party/*' -not -path '*/testdata/*')); \
	if [ -n "$$unformatted" ]; then echo "not gofmt'ed (gofmt -w mends it):" >&2; echo "$$unformatted" >&2; exit 1; fi
	$(GO) vet ./...
	$(GO) test ./internal/lint
	$(GO) test -short -timeout 5m $(TESTFLAGS) ./...

.PHONY: race
race: setup ## the tests under the race detector (needs a C compiler)
	@command -v "$${CC:-cc}" >/dev/null || { echo "race: the race detector needs a C compiler: apt-get install gcc libc6-dev" >&2; exit 1; }
	CGO_ENABLED=1 $(GO) test -race -short -timeout $(TESTTIME) $(TESTFLAGS) ./...

.PHONY: bench
bench: build ## measure against the numbers aimed at; JSON on stdout, words on stderr
	@test -x scripts/bench || { echo "bench: scripts/bench is not there" >&2; exit 1; }
	@scripts/bench $(BENCHFLAGS)

.PHONY: bench-functions
bench-functions: setup build ## measure calls of functions, cold and warm; one line of JSON on stdout
	@scripts/bench-functions $(BENCHFLAGS)

.PHONY: lint
lint: bin/golangci-lint-$(GOLANGCI_LINT_VERSION) ## golangci-lint with .golangci.yml (the first time builds it: 5 minutes)
	$< run ./...

bin/golangci-lint-$(GOLANGCI_LINT_VERSION):
	@mkdir -p bin
	GOBIN=$(CURDIR)/bin $(GO) install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_LINT_VERSION)
	mv bin/golangci-lint $@

.PHONY: gen
gen: ## generate the API's code and its OpenAPI document from api/**/*.proto
	cd tools && $(GO) run ./genproto
	gofmt -l -w api
	$(GO) run ./cmd/blixard gen docs docs

.PHONY: fuzz
fuzz: ## each fuzz target for FUZZTIME (10s)
	@GO='$(GO)' FUZZTIME='$(FUZZTIME)' scripts/fuzz

.PHONY: clean
clean: ## delete what was built
	rm -rf bin/blixard bin/blixard-guest bin/blixard-guest-wasm dist
