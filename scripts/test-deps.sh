#!/bin/sh
# Installs what the tests need from the Debian packages this machine is set up
# for, when it is missing. As an ordinary user it only says what is missing.
set -eu

# command -> package that has it
needs='mkfs.ext4:e2fsprogs mkfs.xfs:xfsprogs mkfs.btrfs:btrfs-progs busybox:busybox-static
       setfattr:attr setfacl:acl setcap:libcap2-bin bsdtar:libarchive-tools
       newuidmap:uidmap umoci:umoci skopeo:skopeo podman:podman zstd:zstd gcc:gcc
       fusermount3:fuse3 fuse-overlayfs:fuse-overlayfs flock:util-linux
       dmsetup:dmsetup thin_dump:thin-provisioning-tools containerd:containerd runc:runc'

PATH=$PATH:/usr/sbin:/sbin
missing=
for n in $needs; do
	command -v "${n%%:*}" >/dev/null 2>&1 || missing="$missing ${n#*:}"
done
# the tests run busybox in roots that hold nothing else
busybox=$(command -v busybox || true)
if [ -n "$busybox" ] && [ -x "$(command -v ldd)" ] && ldd "$busybox" >/dev/null 2>&1; then
	missing="$missing busybox-static"
fi
# the race detector is linked by the C compiler
[ -e /usr/include/stdlib.h ] || missing="$missing libc6-dev"
[ -n "$missing" ] || exit 0

if [ "$(id -u)" != 0 ]; then
	echo "test-deps: missing:$missing (run as root: apt-get install$missing)" >&2
	exit 0
fi
echo "test-deps: installing$missing" >&2
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # a list of words
apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 ||
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends $missing >/dev/null; }
