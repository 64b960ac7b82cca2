# Sourced by the suites of this directory: the private mount namespace, file
# systems on loop files, mounting a union by the kernel or by a program with
# fuse-overlayfs's command line, and the summary line.
#
# A suite is started as
#
#     scripts/suites/NAME.sh [DIRECTORY] KIND [more]
#
# KIND is `kernel` (overlayfs, which says what can be expected of a union on this
# machine), or the path of a program. Everything lives below one directory of
# /dev/shm and is gone at the end, unless SUITE_KEEP=1 keeps the logs.
set -u
suite=$(basename "$0" .sh)
here=$(cd "$(dirname "$0")" && pwd)

# A suite mounts and unmounts in a namespace of its own, so that what a failing
# one leaves goes with it.
if [ -z "${SUITE_IN_NAMESPACE:-}" ]; then
	[ "$(id -u)" = 0 ] || { echo "$suite: needs root" >&2; exit 2; }
	SUITE_IN_NAMESPACE=1 exec unshare --mount --propagation private "$0" "$@"
fi

die() { echo "$suite: $*" >&2; exit 2; }

# use_kind KIND: says by what unions are mounted.
use_kind() {
	kind=$1
	[ "$kind" = kernel ] && return
	[ -x "$kind" ] || die "neither \`kernel\` nor a program: $kind"
	kind=$(realpath "$kind")
}

top=$(mktemp -d /dev/shm/suite.XXXXXX)
chmod 755 "$top" # some tests run as nobody
results=$top/results
mkdir "$results"
passed=0 failed=0 notrun=0 unexpected=0
: >"$top/failed"

# scratch NAME SIZE [mkfs options]: an ext4 of its own at $top/NAME.
scratch() {
	name=$1 size=$2
	shift 2
	truncate -s "$size" "$top/$name.img"
	mkfs.ext4 -q -F "$@" "$top/$name.img" || die "no file system for $name"
	mkdir -p "$top/$name"
	mount -o loop "$top/$name.img" "$top/$name" || die "no loop mount for $name"
}

# union_mount LOWERS UPPER WORK MNT [OPTIONS]
union_mount() {
	options="lowerdir=$1,upperdir=$2,workdir=$3${5:+,$5}"
	if [ "$kind" = kernel ]; then
		mount -t overlay overlay -o "$options" "$4" || die "the kernel does not mount $options"
	else
		timeout 60 "$kind" -o "$options" "$4" || die "$kind does not mount $options"
	fi
	mountpoint -q "$4" || die "nothing is mounted at $4"
}

# union_umount MNT: without hanging on a server that does.
union_umount() {
	timeout 60 umount "$1" && return
	abort_fuse "$1"
	umount -l "$1"
	return 1
}

# abort_fuse MNT: ends the connection, so that nobody waits for its server.
abort_fuse() {
	# the number of a loop device may be that of a connection
	number=$(awk -v m="$1" '$5 == m { number = ""; if (/ - fuse/) { split($3, d, ":"); number = d[2] } } END { print number }' /proc/self/mountinfo)
	[ -n "$number" ] && [ -e "/sys/fs/fuse/connections/$number/abort" ] &&
		echo 1 >"/sys/fs/fuse/connections/$number/abort"
}

# mounts_below DIR: deepest first.
mounts_below() {
	awk -v d="$1/" 'index($5, d) == 1 { print $5 }' /proc/self/mountinfo | tac
}

finish() {
	rc=$?
	trap - EXIT
	cd /
	for m in $(mounts_below "$top"); do
		timeout 30 umount "$m" 2>/dev/null || { abort_fuse "$m"; umount -l "$m" 2>/dev/null; }
	done
	if [ -n "${SUITE_KEEP:-}" ]; then
		echo "$suite: logs in $results" >&2
		rm -f "$top"/*.img
	else
		rm -rf --one-file-system "$top"
	fi
	exit $rc
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

# expected NAME: whether scripts/suites/expected/SUITE names it, for this kind.
# A line is `kernel|program|any NAME reason`.
expected() {
	side=program
	[ "$kind" = kernel ] && side=kernel
	[ -f "$here/expected/$suite" ] &&
		awk -v side="$side" -v name="$1" '($1 == side || $1 == "any") && $2 == name { found = 1 } END { exit !found }' "$here/expected/$suite"
}

# fail NAME: notes a failure by its name; those that expected/ explains are told apart.
fail() {
	failed=$((failed + ${2:-1}))
	if expected "$1"; then
		echo "$1 (expected)" >>"$top/failed"
	else
		unexpected=$((unexpected + 1))
		echo "$1" >>"$top/failed"
	fi
}

# summary [VARIANT]: one line; the exit status of the suite is by what was not expected.
summary() {
	names=$(paste -sd, "$top/failed" | sed 's/,/, /g')
	echo "$suite${1:+ $1} on $(basename "$kind"): $passed passed, $failed failed, $notrun not run${names:+; failed: $names}"
	[ "$unexpected" = 0 ]
}

# listing DIR: what a tree is, to be compared: types, modes, owners, links, sizes,
# times, link targets, xattrs, content.
listing() { # a tree that is not at rest shows as a difference
	(
		cd "$1" || exit
		find . -type d -printf '%y %m %U:%G %T@ %p\n' -o -type l -printf '%y %U:%G %T@ %p -> %l\n' -o -printf '%y %m %U:%G %n %s %T@ %p\n' | sort
		find . -type f -print0 | sort -z | xargs -0 -r sha1sum
		find . -print0 | sort -z | xargs -0 -r getfattr -P -h -d -m '^(user|security|trusted)\.'
	) 2>&1
}

# same_in_kernel LOWERS UPPER WORK MNT OPTIONS LISTING: the kernel's overlayfs shows of
# these layers what LISTING says. Nothing may be mounted of them.
same_in_kernel() {
	mount -t overlay overlay -o "lowerdir=$1,upperdir=$2,workdir=$3${5:+,$5}" "$4" || { echo "the kernel does not mount these layers"; return 1; }
	listing "$4" >"$6.kernel"
	umount "$4"
	cmp -s "$6" "$6.kernel" && return
	echo "differs in the kernel's overlayfs:"
	diff "$6" "$6.kernel" | head -10
	return 1
}
