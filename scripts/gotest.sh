#!/bin/sh
# gotest.sh [go test flags] PACKAGES: runs the tests, prints what was passed and
# skipped per driver, and fails below the floors in ci/expected.
set -eu
# One seed for the random operations of judged runs; `make stress` draws new ones.
export LAYERCTL_SEED="${LAYERCTL_SEED:-1}"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
rc=0
# The file systems of the suites share two cores and one /dev/shm.
{ go test -count=1 -timeout 25m -p 2 "$@" -v 2>&1 || echo "gotest: failed"; } >"$log"
grep -q '^gotest: failed' "$log" && rc=1

# Whole output where something failed, else the summary lines alone.
if [ $rc != 0 ]; then
	grep -vE '^(=== (RUN|PAUSE|CONT|NAME)|[[:space:]]*--- (PASS|SKIP))' "$log" || true
else
	grep -E '^(ok|\?|drivertest:|skipped)' "$log" || true
fi

sh ci/floors.sh "$log" || rc=1

passed=$(grep -cE '^[[:space:]]*--- PASS' "$log" || true)
failed=$(grep -cE '^[[:space:]]*--- FAIL' "$log" || true)
skipped=$(grep -cE '^[[:space:]]*--- SKIP' "$log" || true)
[ "$failed" != 0 ] || [ $rc = 0 ] || failed=1
echo "$passed passed, $failed failed, $skipped skipped"
exit $rc
