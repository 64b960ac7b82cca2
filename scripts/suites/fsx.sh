#!/bin/sh
# fsx.sh DIR KIND [SECONDS]: fsx and fsstress of xfstests, built in DIR, on files that
# start in the lower; SECONDS (60) for each of the four fsx and the fsstress. After
# fsstress the tree is listed, mounted again and listed, listed through the kernel's
# overlayfs, and removed; the file system below is checked.
. "$(dirname "$0")/suite.sh"
usage='usage: fsx.sh DIR KIND [SECONDS]'
dir=$(realpath "${1:?$usage}")
use_kind "${2:?$usage}"
seconds=${3:-60}
fsx=$dir/ltp/fsx fsstress=$dir/ltp/fsstress
[ -x "$fsx" ] && [ -x "$fsstress" ] || die "no ltp/fsx and ltp/fsstress are built in $dir"

scratch fs 8G
l=$top/fs/l u=$top/fs/u w=$top/fs/w m=$top/m
mkdir -p "$l/fsx" "$l/stress" "$u" "$w" "$m"
for f in truncated kept direct mapped; do # -k wants zeros
	dd if=/dev/zero of="$l/fsx/$f" bs=4096 count=64 status=none
done
# What fsstress makes here it makes there again by the same seed, over this. Its device
# nodes are 0/0: whiteouts, in a lower, which overlayfs lists in directories that merge
# with nothing.
seed=${SUITE_SEED:-1}
"$fsstress" -f mknod=0 -d "$l/stress" -s "$seed" -n 400 -p 2 >"$results/lower" 2>&1 || die "fsstress of the lower failed: $(tail -1 "$results/lower")"
listing "$l" >"$results/before"

# run NAME COMMAND...: a command or a function of ours.
run() {
	name=$1
	shift
	if "$@" >"$results/$name" 2>&1; then
		passed=$((passed + 1))
	else
		rc=$?
		fail "$name"
		echo "$name: exit $rc: $(tail -3 "$results/$name" | cut -c1-200)"
	fi
}

union_mount "$l" "$u" "$w" "$m"
mkdir "$top/log"
limit="timeout -k 10 $((seconds + 120))"
x="$limit $fsx -q -c 40 -S $seed --duration=$seconds -P $top/log"
run fsx.truncated $x "$m/fsx/truncated"
run fsx.kept $x -k "$m/fsx/kept"
run fsx.direct $x -k -Z -R -W -r 4096 -w 4096 -t 4096 "$m/fsx/direct"
run fsx.mapped $x -f -y "$m/fsx/mapped"
run fsstress $limit "$fsstress" -f mknod=0 -d "$m/stress" -s "$seed" -n 400 -p 2
run fsstress.long $limit "$fsstress" -d "$m/stress" -s $((seed + 1)) --duration="$seconds" -p 4
sync
run server.alive stat "$m/fsx" # fsstress takes a server that died for an answer
listing "$m" >"$results/tree"
run remount union_umount "$m"
union_mount "$l" "$u" "$w" "$m"
listing "$m" >"$results/again"
run same.after.remount diff "$results/tree" "$results/again"
union_umount "$m"
run same.in.kernel same_in_kernel "$l" "$u" "$w" "$m" redirect_dir=on "$results/tree"
union_mount "$l" "$u" "$w" "$m"
run chattr sh -c "chattr -R -f -i -a '$m/stress' 2>/dev/null; true"
run rm $limit rm -rf "$m/stress" "$m/fsx"
run empty test -z "$(ls -A "$m")"
union_umount "$m"
listing "$l" >"$results/after"
run lower.untouched diff "$results/before" "$results/after"
umount "$top/fs"
run fsck fsck.ext4 -fn "$top/fs.img"
summary
