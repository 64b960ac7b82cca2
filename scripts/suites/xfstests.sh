#!/bin/sh
# xfstests.sh DIR KIND generic|overlay [ARGUMENTS OF check...]: xfstests, built in
# DIR, on a union of two layers on ext4. ARGUMENTS default to `-g generic/quick` or
# `-g overlay/quick`.
#
# generic: the kernel as xfstests's FSTYP=overlay, a program as FSTYP=fuse, found as
# mount(8) finds any FUSE file system: mount -t fuse.NAME, mount.fuse3, NAME in the
# PATH. overlay: FSTYP=overlay for both; the program stands behind `mount -t overlay`,
# df and findmnt say overlay for fuse.NAME, and the awk by which xfstests reads a mount's
# options, to see which features it has, adds those that the program was given: the
# kernel shows none of a FUSE file system's own.
. "$(dirname "$0")/suite.sh"
usage='usage: xfstests.sh DIR KIND generic|overlay [arguments of check]'
dir=$(realpath "${1:?$usage}")
use_kind "${2:?$usage}"
group=${3:?$usage}
shift 3
[ -x "$dir/check" ] && [ -x "$dir/ltp/fsx" ] || die "no xfstests is built in $dir"
[ $# -gt 0 ] || set -- -g "$group/quick"

# Users that the tests want, in this namespace alone.
for f in passwd group shadow; do cp "/etc/$f" "$top/$f"; done
grep -q '^fsgqa:' "$top/passwd" || {
	printf '%s:*:20000:0:99999:7:::\n' fsgqa fsgqa2 123456-fsgqa >>"$top/shadow"
	printf '%s\n' fsgqa:x:2001:2001::/tmp:/bin/bash fsgqa2:x:2002:2002::/tmp:/bin/bash 123456-fsgqa:x:2003:2003::/tmp:/bin/bash >>"$top/passwd"
	printf '%s\n' fsgqa:x:2001: fsgqa2:x:2002: 123456-fsgqa:x:2003: sys:x:3: >>"$top/group"
}
mount --bind "$top/passwd" /etc/passwd
mount --bind "$top/group" /etc/group
mount --bind "$top/shadow" /etc/shadow

scratch test 10G
scratch scratch 10G
mkdir "$top/bin"
# saying PROGRAM TYPE: PROGRAM says TYPE where it would say fuse.NAME.
saying() {
	cat >"$top/bin/$1" <<-END
		#!/bin/sh
		"$(command -v "$1")" "\$@" >"$top/\$\$.out"
		rc=\$?
		sed 's/fuse\.$(basename "$kind")/$2/g' "$top/\$\$.out"
		rm -f "$top/\$\$.out"
		exit \$rc
	END
	chmod +x "$top/bin/$1"
}
# showing_options: awk prints what `mount` here noted of the device that it is asked for.
showing_options() {
	mkdir "$top/given"
	export SUITE_MOUNT_GIVEN="$top/given"
	cat >"$top/bin/awk" <<-END
		#!/bin/sh
		real=$(command -v awk)
		case "\$*" in
		*'match(\$1,dev) { print \$4 }'*) ;;
		*) exec "\$real" "\$@" ;;
		esac
		for a; do case \$a in dev=*) dev=\${a#dev=} ;; esac; done
		"\$real" "\$@" | sed "s|\\\$|,\$(tr '|&' __ 2>/dev/null <"$top/given/\$(echo "\$dev" | tr / _)")|"
	END
	chmod +x "$top/bin/awk"
}
config=$top/config
export PATH="$top/bin:$PATH" SUITE_PROGRAM="$kind" SUITE_MOUNT_LOG="$results/mounts"
if [ "$group" = generic ] && [ "$kind" != kernel ]; then
	saying df fuse # as xfstests wants a FUSE file system to be called
	# mount.fuse3 looks where programs are installed.
	mkdir "$top/installed"
	ln -s "$kind" "$top/installed/$(basename "$kind")"
	mount -t overlay -o "lowerdir=$top/installed:/usr/bin" overlay /usr/bin
	for d in test scratch; do
		mkdir "$top/$d/l" "$top/$d/u" "$top/$d/w" "$top/m.$d"
		echo "from the lower" >"$top/$d/l/file.of.lower"
	done
	options() { echo "-olowerdir=$top/$1/l,upperdir=$top/$1/u,workdir=$top/$1/w${SUITE_OPTIONS:+,$SUITE_OPTIONS}"; }
	cat >"$config" <<-END
		export FSTYP=fuse FUSE_SUBTYP=.$(basename "$kind")
		export TEST_DEV=test_layers TEST_DIR=$top/m.test
		export SCRATCH_DEV=scratch_layers SCRATCH_MNT=$top/m.scratch
		export TEST_FS_MOUNT_OPTS="$(options test)" MOUNT_OPTIONS="$(options scratch)"
	END
else
	umount "$top/test" "$top/scratch"
	cat >"$config" <<-END
		export TEST_DEV=$(losetup --show -f "$top/test.img") TEST_DIR=$top/test
		export SCRATCH_DEV=$(losetup --show -f "$top/scratch.img") SCRATCH_MNT=$top/scratch
		export FSTYP=ext4 OVERLAY_MOUNT_OPTIONS="${SUITE_OPTIONS:+-o $SUITE_OPTIONS}"
	END
	. "$config"
	trap 'rc=$?; for d in "$TEST_DEV" "$SCRATCH_DEV"; do losetup -d "$d"; done; (exit $rc); finish' EXIT
	set -- -overlay "$@"
	if [ "$kind" != kernel ]; then
		cp "$here/mount" "$top/bin/mount"
		saying df overlay
		saying findmnt overlay
		showing_options
	fi
fi
export HOST_OPTIONS="$config" RESULT_BASE="$results/x" LC_ALL=C
mkdir -p "$RESULT_BASE" "$top/tmp"
export TMPDIR="$top/tmp"
# One test at a time, so that one that hangs costs its time and not the run.
list=$(cd "$dir" && ./check -n "$@" 2>"$results/list.err" | tee "$results/list" | grep -oE "^[a-z]+/[0-9]+")
[ -n "$list" ] || { cat "$results/list" "$results/list.err" >&2; die "check lists no tests for $*"; }
opts=
[ "${1:-}" = -overlay ] && opts=-overlay
total=$(echo "$list" | wc -l) n=0
for t in $list; do
	n=$((n + 1))
	log=$results/$(echo "$t" | tr / .)
	(cd "$dir" && timeout -k 10 "${SUITE_TEST_TIMEOUT:-300}" ./check $opts "$t") >"$log" 2>&1
	rc=$?
	if grep -q '^Not run: ' "$log"; then
		notrun=$((notrun + 1))
	elif [ $rc = 0 ] && grep -q '^Passed all' "$log"; then
		passed=$((passed + 1))
	else
		fail "$t"
		echo "$t: exit $rc ($n of $total)"
		grep -v -E '^(FSTYP|PLATFORM|MKFS_OPTIONS|MOUNT_OPTIONS|Ran|Failures|Failed|$)|write error: Permission' "$log" | cut -c1-160 | head -"${SUITE_LINES:-12}"
	fi
	# Processes of the test that outlived it keep its file systems busy.
	for p in /proc/[0-9]*; do
		case $(readlink "$p/exe") in
		"$dir"/*) ! tr '\0' ' ' <"$p/cmdline" | grep -q -F "$top" || kill -9 "${p#/proc/}" ;;
		esac
	done 2>/dev/null
	# What the test left is unmounted, the union's own layers are not.
	tries=0
	while left=$(mounts_below "$top" | grep -v -x -e "$top/test" -e "$top/scratch") && [ -n "$left" ] && [ $tries -lt 20 ]; do
		for m in $left; do
			[ $tries -lt 19 ] || abort_fuse "$m"
			umount "$m" 2>/dev/null || sleep 0.5
		done
		tries=$((tries + 1))
	done
done
[ -z "${SUITE_KEEP:-}" ] || grep -h -A1 -E '\[not run\]' "$results"/*.[0-9]* | grep -E 'not run' | sed 's/.*\[not run\] *//' | sort | uniq -c | sort -rn >"$results/notrun"
summary "$group"
