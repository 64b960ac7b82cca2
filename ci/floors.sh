#!/bin/sh
# floors.sh LOG: holds the "drivertest: DRIVER on FS: N passed, M skipped" lines
# of a test run against the floors in ci/expected, and fails below them. A log
# without any such line (a run of other packages) is not judged.
set -eu
log=${1:?usage: floors.sh LOG}
[ "$(id -u)" = 0 ] || exit 0 # the floors are root's
grep -q '^drivertest: ' "$log" || exit 0
awk '
	FNR == NR && (/^#/ || NF == 0) { next }
	FNR == NR { floor[$1 " on " $2] = $3; next }
	/^drivertest: / { key = $2 " on " $4; sub(/:$/, "", key); passed[key] = $5 + 0 }
	END {
		for (k in floor) {
			if (!(k in passed)) { printf "floors: %s did not run\n", k; bad = 1 }
			else if (passed[k] < floor[k]) { printf "floors: %s: %d passed, at least %d expected\n", k, passed[k], floor[k]; bad = 1 }
		}
		exit bad
	}' "$(dirname "$0")/expected" "$log"
