#!/bin/sh
# pjdfstest.sh DIR KIND [upper|merged] [FILTER]: pjdfstest, built in DIR, on a union.
#
# upper: below a directory that only the upper has. merged: every test file runs
# in a directory that is in the lower, with something in it, so that the first
# thing made there merges it. FILTER is a pattern of files, as rename/*.
. "$(dirname "$0")/suite.sh"
dir=$(realpath "${1:?usage: pjdfstest.sh DIR KIND [upper|merged] [FILTER]}")
use_kind "${2:?usage: pjdfstest.sh DIR KIND [upper|merged] [FILTER]}"
mode=${3:-upper} filter=${4:-*}
[ -x "$dir/pjdfstest" ] || die "no pjdfstest is built in $dir"

scratch fs 2G
l=$top/fs/l u=$top/fs/u w=$top/fs/w m=$top/m
mkdir -p "$l" "$u" "$w" "$m"
tests=$(cd "$dir/tests" && find . -name '*.t' -path "./$filter" | sed 's,^\./,,' | sort)
for t in $tests; do
	d=d/$(echo "${t%.t}" | tr / -)
	if [ "$mode" = merged ]; then
		mkdir -p "$l/$d/below"
		echo lower >"$l/$d/file"
	fi
done
chmod -R a+rX "$l"
union_mount "$l" "$u" "$w" "$m"
for t in $tests; do
	name=$(echo "${t%.t}" | tr / -)
	mkdir -p "$m/d/$name"
	(cd "$m/d/$name" && timeout 600 sh "$dir/tests/$t") >"$results/$name" 2>&1
	# counts: passed, failed (an assertion of the plan that never came is one)
	counts=$(awk '
		/^1\.\.[0-9]+/ { split($1, p, "."); plan = p[3] }
		/^(not )?ok/ { seen++ }
		/^ok/ || /^not ok.*# TODO/ { pass++ }
		END { if (plan > seen) seen = plan; print pass + 0, seen - pass }' "$results/$name")
	passed=$((passed + ${counts% *}))
	if [ "${counts#* }" != 0 ]; then
		fail "$t" "${counts#* }"
		grep '^not ok' "$results/$name" | grep -v '# TODO' | head -5 | cut -c1-150 | sed "s,^,$t: ,"
	fi
done
union_umount "$m" || fail umount
summary "$mode"
