# Everything a newcomer needs is `make demo` and `make test`.
GO      ?= go
BIN     := bin
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo unknown)
LDFLAGS := -s -w -X main.version=$(VERSION)
PKGS    := ./...

export GOFLAGS ?= -buildvcs=false
# As root on a machine with loop devices an expected test that skips has failed.
ifeq ($(shell id -u),0)
export LAYERCTL_EXPECT := root
endif

.PHONY: crash test-btrfs-profiles test-power-cuts differential test-vm all build demo test check deps lint fmt vet staticcheck race fuzz floors peers stress fuzz-long bench bench-fuse suite-pjdfstest suite-unionmount suite-xfstests-generic suite-xfstests-overlay suite-fsx suite-stress-ng suite-podman suite-podman-times images install man clean

all: build

build: $(BIN)/layerctl $(BIN)/layerd $(BIN)/fuse-layerfs ## the programs, static, into bin/

$(BIN)/%: FORCE
	@mkdir -p $(BIN)
	CGO_ENABLED=0 $(GO) build -trimpath -ldflags '$(LDFLAGS)' -o $@ ./cmd/$*
FORCE:

demo: build ## the main job on a real tree, with the best driver that works here
	@demo/demo.sh $(BIN)/layerctl

deps: ## what the tests need, from Debian packages, when missing
	@scripts/test-deps.sh

test: deps build ## every test
	scripts/gotest.sh $(PKGS)
	cd bench/peers && $(GO) vet ./...
	cd bench/fuse && $(GO) vet ./...

check: deps lint race fuzz ## what CI runs

lint: fmt vet staticcheck ## gofmt, vet, staticcheck and the import rules
	$(GO) test ./internal/lint

fmt:
	@out=$$(gofmt -l $$(git ls-files --cached --others --exclude-standard '*.go')); [ -z "$$out" ] || { echo "gofmt needed:"; echo "$$out"; exit 1; }

vet:
	$(GO) vet $(PKGS)
	cd bench/peers && $(GO) vet ./...
	cd bench/fuse && $(GO) vet ./...

staticcheck:
	$(GO) tool -modfile=tools/go.mod staticcheck $(PKGS)

race: ## the tests of what goroutines share, under the race detector: see ci/race
	scripts/race.sh

fuzz: ## every fuzz target for a few seconds
	scripts/fuzz.sh 4s

fuzz-long: ## every fuzz target for ten minutes
	scripts/fuzz.sh 10m

test-vm: deps ## tests on kernels that have device-mapper, project quota, an older overlayfs: in virtual machines
	scripts/test-vm.sh

test-power-cuts: deps ## slow: a recorded history of a thin pool's layers, cut at 1,200 flushes, in a virtual machine
	CGO_ENABLED=0 $(GO) build -o $(BIN)/vm ./internal/testenv/vm/cmd
	LAYERCTL_SEED=$${LAYERCTL_SEED:-$$(date +%s)} LAYERCTL_EXPECT_DM=1 LAYERCTL_CUT_STEPS=30 LAYERCTL_CUT_POINTS=600 $(GO) test -count=1 -timeout 60m \
		-exec "$(CURDIR)/$(BIN)/vm -kernel new -timeout 60m -memory 3072" -run TestPowerCutAtEveryFlush/pool -v ./devmapper

CRASHES ?= 1000
crash: deps ## slow, needs root: layerd killed CRASHES times under three clients, over all drivers and file systems, and cut from power
	@mkdir -p out
	LAYERCTL_SEED=$${LAYERCTL_SEED:-$$(date +%s)} LAYERCTL_CRASH=$(CRASHES) $(GO) test -count=1 -timeout 120m -run 'TestCrash$$' -v ./cmd/layerd | tee out/crash.log

test-btrfs-profiles: deps ## slow, needs root: the btrfs driver on 4 KiB nodes, DUP, zstd, qgroups, simple quotas, nearly full
	scripts/btrfs-profiles.sh

stress: ## slow: the store under eight processes and a killer, a minute a driver; random operations, thirty seeds
	LAYERCTL_STRESS=2m $(GO) test -count=1 -timeout 30m -run TestStress -v ./snapshot
	LAYERCTL_SEED= $(GO) test -count=30 -timeout 60m -run 'TestDriver/.*/random_operations' ./drivers/native ./overlay

differential: ## slow: random operations on fuse-layerfs and the kernel's overlayfs, an hour
	LAYERCTL_DIFFERENTIAL=1h $(GO) test -count=1 -timeout 90m -run 'TestDifferential$$' -v ./fuse/uniontest

bench: ## the benchmarks, peers beside ours; bench/RESULTS.md says how its figures were made
	cd bench/peers && $(GO) run . -runs 9

bench-fuse: build ## unions beside each other: NEWEST and LOOPBACK may name builds of fuse-overlayfs and of go-fuse's loopback
	cd bench/fuse && $(GO) run . -runs 5 -newest "$(NEWEST)" -loopback "$(LOOPBACK)"

# Suites of others, which are not in this repository: DIR is a directory in which one
# is built, KIND is `kernel` or a program with fuse-overlayfs's command line.
KIND ?= kernel
suite-pjdfstest: ## slow, needs root: pjdfstest in DIR, on a union made by KIND
	scripts/suites/pjdfstest.sh "$(DIR)" "$(KIND)" upper
	scripts/suites/pjdfstest.sh "$(DIR)" "$(KIND)" merged
suite-unionmount: ## slow, needs root: unionmount-testsuite in DIR
	scripts/suites/unionmount.sh "$(DIR)" "$(KIND)"
suite-xfstests-generic: ## slow, needs root: generic/quick of xfstests in DIR
	scripts/suites/xfstests.sh "$(DIR)" "$(KIND)" generic
suite-xfstests-overlay: ## slow, needs root: overlay/quick of xfstests in DIR
	scripts/suites/xfstests.sh "$(DIR)" "$(KIND)" overlay
suite-fsx: ## slow, needs root: fsx and fsstress of xfstests in DIR
	scripts/suites/fsx.sh "$(DIR)" "$(KIND)" 300
suite-stress-ng: ## slow, needs root: stress-ng's filesystem class
	scripts/suites/stress-ng.sh "$(KIND)" 600
suite-podman: ## slow, needs root: Podman and Buildah, as root and rootless
	scripts/suites/podman.sh "$(KIND)" root
	scripts/suites/podman.sh "$(KIND)" rootless
suite-podman-times: ## slow, needs root: how long Podman takes with KIND, the kernel and fuse-overlayfs
	scripts/suites/podman.sh "$(KIND)" times

images: build ## slow: a real six-layer Debian image for trials, into out/images
	scripts/make-images.sh out/images

man: build ## man pages into out/man
	$(BIN)/layerctl man out/man
	$(BIN)/layerd man out/man

PREFIX ?= /usr/local
install: build
	install -D -m 0755 -t $(DESTDIR)$(PREFIX)/bin $(BIN)/layerctl $(BIN)/layerd $(BIN)/fuse-layerfs
	install -D -m 0644 -t $(DESTDIR)$(PREFIX)/lib/systemd/system dist/systemd/layerd.service dist/systemd/layerd.socket

clean:
	rm -rf $(BIN) out
