#!/bin/sh
# make-images.sh OUT: makes a real image to try things with, of six Debian layers,
# by mmdebstrap and umoci: made by others on purpose, to be read by us.
#
#   OUT/oci            image layout, one tag for each layer, "full" for the last
#   OUT/full.oci.tar   OUT/full.docker.tar    the same image as archives
#
# The last layer holds what is hard to carry: whiteouts of a purged package, an
# opaque directory, hard links, file capabilities, xattrs, devices, setuid.
# SUITE and SOURCE_DATE_EPOCH may be set. Needs root, and a quarter of an hour.
set -eu

out=${1:?usage: make-images.sh OUT}
suite=${SUITE:-bookworm}
: "${SOURCE_DATE_EPOCH:=1735689600}" # 2025-01-01
export SOURCE_DATE_EPOCH LC_ALL=C DEBIAN_FRONTEND=noninteractive

[ "$(id -u)" = 0 ] || { echo "make-images: needs root" >&2; exit 1; }
for p in mmdebstrap umoci skopeo setcap setfattr; do
	command -v "$p" >/dev/null || { echo "make-images: no $p (apt-get install mmdebstrap umoci skopeo libcap2-bin attr)" >&2; exit 1; }
done

mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -rf "$out/oci" "$out/full.oci.tar" "$out/full.docker.tar"
tmp=$(mktemp -d "$out/tmp.XXXXXX")
root=$tmp/bundle/rootfs
finish() {
	for m in dev proc; do
		if mountpoint -q "$root/$m"; then umount "$root/$m"; fi
	done
	rm -rf "$tmp"
}
trap finish EXIT
trap 'exit 1' INT TERM

say() { echo "make-images: $*" >&2; }

# in_root CMD...: runs a command in the tree, with what package scripts need.
in_root() {
	mount -t proc proc "$root/proc"
	mount --bind /dev "$root/dev"
	rm -f "$root/etc/resolv.conf"
	cat /etc/resolv.conf >"$root/etc/resolv.conf"
	printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d" # start no daemons
	chmod 755 "$root/usr/sbin/policy-rc.d"
	rc=0
	chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root DEBIAN_FRONTEND=noninteractive "$@" >>"$out/log" 2>&1 || rc=$?
	rm -f "$root/usr/sbin/policy-rc.d" "$root/etc/resolv.conf"
	umount "$root/dev" "$root/proc"
	[ $rc = 0 ] || { say "failed: $* (see $out/log)"; return $rc; }
}

install_packages() {
	in_root apt-get -q update
	in_root apt-get -q install -y --no-install-recommends "$@"
}

# layer TAG: what changed since the last layer becomes the next one.
layer() {
	rm -rf "$root"/var/cache/apt/*.bin "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/* "$root"/var/log/*.log "$root"/var/log/apt/* "$root"/tmp/*
	find "$root" -xdev -newermt "@$SOURCE_DATE_EPOCH" -exec touch -h -d "@$SOURCE_DATE_EPOCH" {} +
	date=$(date -u -d "@$SOURCE_DATE_EPOCH" +%Y-%m-%dT%H:%M:%SZ)
	umoci repack --refresh-bundle --image "$out/oci:work" --history.created "$date" --history.created_by "make-images $1" "$tmp/bundle"
	umoci config --image "$out/oci:work" --tag "$1" --created "$date" --no-history
	say "layer $1"
}

: >"$out/log"
say "base of $suite"
umoci init --layout "$out/oci"
umoci new --image "$out/oci:work"
umoci config --image "$out/oci:work" --config.cmd /bin/bash --config.env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --no-history
umoci unpack --image "$out/oci:work" "$tmp/bundle"
mmdebstrap --quiet --variant=minbase --include=ca-certificates "$suite" "$tmp/root.tar" >>"$out/log" 2>&1
tar -C "$root" --xattrs --xattrs-include='*' --exclude='./dev/*' -xpf "$tmp/root.tar"
rm "$tmp/root.tar"
layer base
install_packages python3
layer python
install_packages git
layer git
install_packages gcc libc6-dev make
layer build
install_packages nodejs
layer node

in_root apt-get -q purge -y git git-man
in_root apt-get -q autoremove -y
rm -rf "$root/usr/share/doc"
mkdir "$root/usr/share/doc"
echo "only this" >"$root/usr/share/doc/README"
d=$root/srv/kinds
mkdir -p "$d"
chmod 700 "$root/srv"
echo data >"$d/data"
ln "$d/data" "$d/hard"
ln -s data "$d/soft"
mkfifo "$d/fifo"
mknod "$d/null" c 1 3
cp "$root/bin/ls" "$d/setuid"
chmod 4755 "$d/setuid"
cp "$root/bin/cat" "$d/capable"
setcap cap_net_raw+ep "$d/capable"
setfattr -n user.test -v value "$d/data"
chown 1234:5678 "$d/data"
truncate -s 64M "$d/sparse"
layer clean

umoci tag --image "$out/oci:clean" full
umoci rm --image "$out/oci:work"
umoci gc --layout "$out/oci"
say archives
skopeo --insecure-policy copy -q "oci:$out/oci:full" "oci-archive:$out/full.oci.tar:localhost/full:latest"
skopeo --insecure-policy copy -q "oci:$out/oci:full" "docker-archive:$out/full.docker.tar:localhost/full:latest"
rm "$out/log"
say "made $(du -sh "$out" | cut -f1) in $out; LAYERCTL_IMAGES=$out go test ./image -run RealImage"
