#!/bin/sh
# podman.sh KIND [root|rootless|times] [ROUNDS]: Podman and Buildah (Debian packages) with
# the kernel's overlayfs, or with a program as containers/storage's mount_program: import,
# save, load, run, diff, commit, export, build with RUN, Buildah's from, run, copy and
# commit. The image is busybox and the Go toolchain's tree.
#
# What diff, export and the committed layer say is compared with what the kernel's
# overlayfs said, in the same run. Prints the milliseconds of each step, least of ROUNDS (1).
#
# times: as root, ROUNDS (5) of run, change, diff, commit and build by the kernel, the
# program and fuse-overlayfs in turn; prints medians, and the program's ratio to each.
. "$(dirname "$0")/suite.sh"
usage='usage: podman.sh KIND [root|rootless|times] [ROUNDS]'
use_kind "${1:?$usage}"
who=${2:-root}
if [ "$who" = times ]; then rounds=${3:-5}; else rounds=${3:-1}; fi
peer=$(command -v fuse-overlayfs)
for p in podman buildah runc busybox; do command -v $p >/dev/null || die "no $p is installed"; done
tree=${SUITE_TREE:-$(go env GOROOT)}
[ -d "$tree" ] || die "no tree $tree"

scratch fs 16G
chmod 755 "$top/fs"
mknod -m 666 "$top/fuse" c 10 229
mount --bind "$top/fuse" /dev/fuse
as=
if [ "$who" = rootless ]; then
	for f in passwd group shadow subuid subgid; do
		touch "/etc/$f"
		cp "/etc/$f" "$top/$f"
	done
	echo "suite:x:3001:3001::$top/fs/home:/bin/sh" >>"$top/passwd"
	echo "suite:*:20000:0:99999:7:::" >>"$top/shadow"
	echo suite:x:3001: >>"$top/group"
	for f in subuid subgid; do echo suite:300000:65536 >>"$top/$f"; done
	for f in passwd group shadow subuid subgid; do mount --bind "$top/$f" "/etc/$f"; done
	as="setpriv --reuid=3001 --regid=3001 --clear-groups env HOME=$top/fs/home XDG_RUNTIME_DIR=$top/fs/home/run PATH=$PATH"
	mkdir "$top/fs/home"
	chown 3001:3001 "$top/fs/home"
	$as mkdir -m 700 "$top/fs/home/run"
else
	as="env HOME=$top/fs/home"
	mkdir -p "$top/fs/home"
fi
work=$top/fs/home
chmod 777 "$results"

# The root file system, and what a container and a build do to it.
mkdir -p "$top/fs/tree/bin" "$top/fs/tree/tmp" "$top/fs/tree/etc" "$top/fs/tree/usr"
cp "$(command -v busybox)" "$top/fs/tree/bin/busybox"
for a in sh ls cat rm mkdir mv ln cp echo chmod touch true find tar test; do ln -s busybox "$top/fs/tree/bin/$a"; done
cp -a "$tree" "$top/fs/tree/usr/go"
tar -C "$top/fs/tree" --owner=0 --group=0 -cf "$work/root.tar" . || die "no image"
rm -rf "$top/fs/tree"
cat >"$work/change" <<'END'
set -e
rm -rf /usr/go/test /usr/go/api
rm /usr/go/README.md
mkdir /new /new/sub
echo new >/new/sub/file
ln -s sub /new/link
ln /new/sub/file /new/hard
chmod 600 /usr/go/LICENSE
echo more >>/usr/go/VERSION
mv /usr/go/src/sort /usr/go/src/sorted || { cp -a /usr/go/src/sort /usr/go/src/sorted; rm -rf /usr/go/src/sort; }
mkdir /usr/go/api
echo again >/usr/go/api/one
mv /new/hard /usr/go/README.md
touch -d 2001-01-01 /usr/go/src/cmd
END
mkdir "$work/context"
cp "$work/change" "$work/context/change"
cat >"$work/context/Containerfile" <<'END'
FROM localhost/base
RUN echo one >/one
COPY change /change
RUN sh /change
RUN find / -xdev | cat >/dev/null; echo three >/three
END
[ "$who" = root ] || chown -R 3001:3001 "$work"

limits='--ulimit nofile=20000:20000 --ulimit nproc=20000:20000'
# name KIND: what its files are called by.
name() {
	case $1 in
	kernel) echo kernel ;;
	"$kind") echo program ;;
	*) echo peer ;;
	esac
}

# engine KIND TOOL ARGUMENTS...
engine() {
	k=$1 tool=$2
	shift 2
	program= n=$(name "$k")
	[ "$k" = kernel ] || program="--storage-opt overlay.mount_program=$k"
	more=
	[ "$tool" = podman ] && more="--runtime runc --cgroup-manager cgroupfs --events-backend file --tmpdir $work/tmp.$n"
	# shellcheck disable=SC2086
	timeout 600 $as $tool --root "$work/root.$n" --runroot "$work/run.$n" --storage-driver overlay $program $more "$@"
}

# step NAME COMMAND...: output to $results/$n.NAME, time to $results/$n.times
step() {
	name=$1
	shift
	start=$(date +%s%N)
	if "$@" >"$results/$n.$name" 2>"$results/$n.$name.err"; then
		passed=$((passed + 1))
	else
		fail "$name"
		echo "$n $name: $(tail -3 "$results/$n.$name.err" | cut -c1-300)"
	fi
	echo "$name $((($(date +%s%N) - start) / 1000000))" >>"$results/$n.times"
}

# contents TAR: what matters of a layer's tar.
contents() { tar --numeric-owner -tvf "$1" | sed -E 's/ +/ /g' | sed -E 's/ [0-9-]+ [0-9:]+ / /' | sort; }

# no times: those of this run differ from those of the other
go() {
	k=$1 n=$(name "$1")
	e="engine $k"
	run="--network none"
	step import $e podman import "$work/root.tar" localhost/base
	step save $e podman save -o "$work/base.$n.tar" localhost/base
	step rmi $e podman rmi localhost/base
	step load $e podman load -i "$work/base.$n.tar"
	$as rm -f "$work/base.$n.tar"
	# shellcheck disable=SC2086
	step run $e podman run --rm $run $limits localhost/base true
	step change $e podman run --name c $run $limits -v "$work/change:/change:ro" localhost/base sh /change
	step diff $e podman diff c
	step commit $e podman commit -q c localhost/changed
	step export $e podman export -o "$work/export.$n.tar" c
	step committed $e podman run --rm $run $limits localhost/changed sh -c 'cat /usr/go/VERSION /new/sub/file; test ! -e /usr/go/test; ls /usr/go/api'
	step build $e podman build -q $limits --network none --layers=true -t localhost/built "$work/context"
	step built $e podman run --rm $run $limits localhost/built cat /one /three
	step buildah.from $e buildah from --name b localhost/base
	step buildah.run $e buildah run --runtime runc --network none b sh -c 'echo x >/x; rm /usr/go/README.md'
	step buildah.copy $e buildah copy b "$work/change" /change
	step buildah.commit $e buildah commit -q b localhost/bb
	step rm $e podman rm -f c
	step buildah.rm $e buildah rm b
	contents "$work/export.$n.tar" >"$results/$n.export"
	sort -o "$results/$n.diff" "$results/$n.diff"
	$as rm -f "$work/export.$n.tar"
	step rmi.all $e podman rmi -a -f
	gone
}

# gone removes the store of the engine $e, $n.
gone() {
	if [ "$who" = rootless ]; then
		# podman has bound it to itself, in the namespace that it keeps
		$e podman unshare sh -c 'umount "$1/overlay"; rm -rf "$1" "$2"' - "$work/root.$n" "$work/run.$n"
	else
		for m in $(mounts_below "$work/root.$n"); do umount "$m"; done
		rm -rf "$work/root.$n" "$work/run.$n"
	fi
}

# timed KIND: one round.
timed() {
	k=$1 n=$(name "$1")
	e="engine $k"
	# shellcheck disable=SC2086
	step run $e podman run --rm --network none $limits localhost/base true
	step change $e podman run --name c --network none $limits -v "$work/change:/change:ro" localhost/base sh /change
	step diff $e podman diff c
	step commit $e podman commit -q c localhost/changed
	step build $e podman build -q $limits --network none --no-cache -t localhost/built "$work/context"
	{ $e podman rm -f c; $e podman rmi -f localhost/changed localhost/built; } >>"$results/$n.rest" 2>&1
}

# medians of a file of names and milliseconds.
medians() { sort -k1,1 -k2,2n "$1" | awk '{ t[$1] = t[$1] " " $2 } END { for (s in t) { c = split(t[s], v, " "); print s, v[int((c + 1) / 2)] } }' | sort; }

race() {
	kinds="kernel${peer:+ $peer}"
	[ "$kind" = kernel ] || kinds="kernel $kind${peer:+ $peer}"
	for k in $kinds; do
		n=$(name "$k") e="engine $k"
		step import $e podman import "$work/root.tar" localhost/base
		rm "$results/$n.times"
	done
	for _ in $(seq "$rounds"); do
		for k in $kinds; do timed "$k"; done
	done
	for k in $kinds; do
		n=$(name "$k") e="engine $k"
		medians "$results/$n.times" >"$results/$n.medians"
		$e podman rmi -a -f >/dev/null 2>&1
		gone
	done
	[ "$kind" = kernel ] && return
	echo "ms, medians of $rounds: $(basename "$kind"), kernel (its ratio)${peer:+, fuse-overlayfs (its ratio)}"
	while read -r s ours; do
		line="$s $ours"
		for n in kernel peer; do
			theirs=$(awk -v s="$s" '$1 == s { print $2 }' "$results/$n.medians" 2>/dev/null)
			[ -z "$theirs" ] || line="$line, $theirs ($(awk -v a="$ours" -v b="$theirs" 'BEGIN { printf "%.2f", a / b }'))"
		done
		echo "$line"
	done <"$results/program.medians"
}

least() { sort -k1,1 -k2,2n "$1" | awk '!seen[$1]++ { printf "%s %s; ", $1, $2 }'; }

if [ "$who" = times ]; then
	race
	summary "$who"
	exit
fi
for _ in $(seq "$rounds"); do
	go kernel
	[ "$kind" = kernel ] || go "$kind"
done
echo "podman $who, kernel, ms: $(least "$results/kernel.times")"
if [ "$kind" != kernel ]; then
	echo "podman $who, $(basename "$kind"), ms: $(least "$results/program.times")"
	for f in diff export committed built; do
		if cmp -s "$results/kernel.$f" "$results/program.$f"; then
			passed=$((passed + 1))
		else
			fail "same.$f"
			diff "$results/kernel.$f" "$results/program.$f" | head -8
		fi
	done
fi
summary "$who"
