#!/bin/sh
# gotest.sh [go test flags] PACKAGES: runs the tests and prints failures, what was
# passed and skipped per driver, the slowest packages, and the count. Fails below
# the floors in ci/expected, which are root's.
set -eu
# One seed for the random operations of judged runs; `make stress` draws new ones.
export LAYERCTL_SEED="${LAYERCTL_SEED:-1}"
floors=
[ "$(id -u)" != 0 ] || floors=ci/expected
case " $* " in *" -short "* | *" -exec "*) floors= ;; esac # they leave cases out
mkdir -p bin
(cd tools && go build -o ../bin/testsum ./testsum)
go test -json -count=1 -timeout 25m -p 2 "$@" | bin/testsum ${floors:+-floors "$floors"}
