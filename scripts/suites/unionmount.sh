#!/bin/sh
# unionmount.sh DIR KIND [VARIANT...]: unionmount-testsuite, checked out in DIR, on a
# union. A variant is the suite's options joined by `+`; `+xlower` puts the lowest
# layer on a file system of its own. The suite mounts by `mount -t overlay`, so
# a program stands behind a mount(8) of ours, and every check of the kernel's holds.
. "$(dirname "$0")/suite.sh"
usage='usage: unionmount.sh DIR KIND [VARIANT...] (as --ov=10+--meta)'
dir=$(realpath "${1:?$usage}")
use_kind "${2:?$usage}"
shift 2
[ -e "$dir/mount_union.py" ] || die "no unionmount-testsuite in $dir"
[ $# -gt 0 ] || set -- --ov --ov+--xdev --ov=1 --ov=10 --ov+--meta --ov=10+--verify --ov=10+--meta+--verify --ov+--xino+xlower --ov=10+--xino+--verify+xlower

scratch base 1G
scratch lower 512M
mkdir "$top/bin" "$top/m"
cp "$here/mount" "$top/bin/mount"
export PATH="$top/bin:$PATH" SUITE_PROGRAM="$kind" SUITE_MOUNT_LOG="$results/mounts"
export UNIONMOUNT_BASEDIR="$top/base" UNIONMOUNT_MNTPOINT="$top/m" PYTHONDONTWRITEBYTECODE=1
# The scripts that `run` lists; the last five depend on whether directories move.
tests=$(sed -n 's/^ *"\([a-z0-9-]*\)",\{0,1\}$/\1/p' "$dir/run" | sort -u)
moving=' rename-dir rename-empty-dir rename-pop-dir rename-move-dir '
rc=0
for variant; do
	passed=0 failed=0 notrun=0
	: >"$top/failed"
	# shellcheck disable=SC2086 # a list of words
	set -- $(echo "$variant" | tr + ' ')
	for t in $tests; do
		case $variant in
		*--xdev*) case $moving in *" $t "*) continue ;; esac ;;
		*) [ "$t" = rename-exdev ] && continue ;;
		esac
		unset UNIONMOUNT_LOWERDIR UNIONMOUNT_MNTOPTIONS
		# the kernel's default is its own; a program may have another
		case $variant in *--xdev*) export UNIONMOUNT_MNTOPTIONS=redirect_dir=off ;; esac
		args=
		for a; do
			if [ "$a" = xlower ]; then
				export UNIONMOUNT_LOWERDIR="$top/lower"
			else
				args="$args $a"
			fi
		done
		log=$results/$variant.$t
		# shellcheck disable=SC2086
		if (cd "$dir" && timeout 300 python3 ./run $args "$t") >"$log" 2>&1; then
			passed=$((passed + $(grep -c '^TEST ' "$log")))
		else
			# the last subtest that began is the one that failed
			n=$(grep -c '^TEST ' "$log")
			[ "$n" = 0 ] || passed=$((passed + n - 1))
			fail "$t"
			echo "$variant $t: $(tail -1 "$log")"
			sed -n 's/^TEST //p' "$log" | tail -1
		fi
		for m in $(mounts_below "$top" | grep -v -x -e "$top/base" -e "$top/lower"); do
			union_umount "$m"
		done
		rm -rf "$top/base"/* "$top/lower"/*
	done
	summary "$variant" || rc=1
done
exit $rc
