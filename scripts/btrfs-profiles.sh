#!/bin/sh
# The btrfs driver's suite, and its own tests, on file systems of every profile
# that has something to do with it. Needs root; one line of each that is done.
#
#	scripts/btrfs-profiles.sh [PROFILE...]
set -eu
cd "$(dirname "$0")/.."

out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
CGO_ENABLED=0 go test -c -o "$out/btrfs.test" ./btrfs

# The tests that switch quota on themselves, or fill the file system.
own='TestQuota|TestUsageByQuota|TestQgroup|TestAccounting|TestEnableQuota|TestUsageAfterSync|TestWaitFreed|TestFullFileSystem'

run() { # name, tests left out, environment...
	name=$1 skip=$2
	shift 2
	case " $wanted " in "  " | *" $name "*) ;; *) return 0 ;; esac
	if (cd btrfs && env "$@" "$out/btrfs.test" -test.timeout 20m ${skip:+-test.skip "$skip"} >"$out/$name" 2>&1); then
		echo "$name: $(grep -c . "$out/$name" >/dev/null && grep '^drivertest:' "$out/$name" | tr '\n' ';') ok"
	else
		cat "$out/$name"
		echo "$name: FAILED"
		failed=1
	fi
}

wanted="$*" failed=0
run 4k-nodes '' LAYERCTL_BTRFS_MKFS='-n 4096'
run dup '' LAYERCTL_BTRFS_MKFS='-m dup -d dup'
run zstd '' LAYERCTL_BTRFS_MOUNT=compress-force=zstd
run qgroups "$own" LAYERCTL_BTRFS_QUOTA=qgroups
run simple-quotas "$own" LAYERCTL_BTRFS_QUOTA=simple
run nearly-full "$own" LAYERCTL_BTRFS_FREE=160
exit $failed
