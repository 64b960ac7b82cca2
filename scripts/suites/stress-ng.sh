#!/bin/sh
# stress-ng.sh KIND [SECONDS]: the filesystem class of stress-ng (a Debian package) on
# a union, each stressor in turn, SECONDS (600) in all, with verification.
. "$(dirname "$0")/suite.sh"
usage='usage: stress-ng.sh KIND [SECONDS]'
use_kind "${1:?$usage}"
seconds=${2:-600}
command -v stress-ng >/dev/null || die "no stress-ng is installed"

scratch fs 6G
l=$top/fs/l u=$top/fs/u w=$top/fs/w m=$top/m
mkdir -p "$l/d" "$u" "$w" "$m"
chmod 777 "$l/d"
union_mount "$l" "$u" "$w" "$m"
# Stressors that are about no file system, or mount things of their own.
skip=' bind-mount binderfs dup eventfd handle io ioprio procfs '
stressors=$(stress-ng --class 'filesystem?' 2>&1 | sed -n "s/^class 'filesystem' stressors: //p")
[ -n "$stressors" ] || die "stress-ng names no stressors"
n=0
for s in $stressors; do case $skip in *" $s "*) ;; *) n=$((n + 1)) ;; esac; done
each=$((seconds / n + 1))
for s in $stressors; do
	case $skip in *" $s "*) notrun=$((notrun + 1)); continue ;; esac
	if (cd "$m/d" && timeout -k 10 $((each + 120)) stress-ng --temp-path "$m/d" --verify --timeout "${each}s" "--$s" 2 --hdd-bytes 64M --iomix-bytes 64M --fallocate-bytes 64M) >"$results/$s" 2>&1; then
		passed=$((passed + 1))
	else
		rc=$?
		if [ $rc = 3 ] || [ $rc = 4 ]; then # no resources; not implemented
			notrun=$((notrun + 1))
		else
			fail "$s"
			echo "$s: exit $rc: $(grep -E 'fail|error' "$results/$s" | head -3)"
		fi
	fi
	rm -rf "$m/d"/*
done
sync
union_umount "$m" || fail umount
umount "$top/fs"
fsck.ext4 -fn "$top/fs.img" >"$results/fsck" 2>&1 || fail fsck
summary
