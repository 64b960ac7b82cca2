#!/bin/sh
# test-vm.sh: the tests that need a kernel with device-mapper, project quota or an
# older overlayfs, in guests of User Mode Linux (go doc ./internal/testenv/vm).
# Where the host's kernel has device-mapper its tests run on the host, too.
set -eu
vm="$PWD/bin/vm"
mkdir -p bin
CGO_ENABLED=0 go build -o "$vm" ./internal/testenv/vm/cmd
for kernel in new stable; do
	"$vm" -kernel $kernel -install # ends here if a kernel cannot be had
done

# KERNEL [go test flags] PACKAGES
in_guest() {
	kernel=$1
	shift
	echo "== $* on the kernel $kernel"
	LAYERCTL_EXPECT_DM=1 scripts/gotest.sh -exec "$vm -kernel $kernel" "$@"
}

echo "== the guests themselves"
LAYERCTL_VM=new go test -count=1 ./internal/testenv/vm
LAYERCTL_VM=stable go test -count=1 -run 'Guest|PowerCut' ./internal/testenv/vm
echo "== a thin pool that loses its power"
LAYERCTL_VM=new go test -count=1 -run TestMachineLosesItsPower ./devmapper
if dmsetup version >/dev/null 2>&1; then # the node alone says nothing
	echo "== ./devmapper/... on this machine"
	LAYERCTL_EXPECT_DM=1 scripts/gotest.sh -exec env ./devmapper/...
fi
# of xfs in the layers what differs from ext4: mounts, logs, power cuts, users at commit
same='exact_[^A]|stack|random|lists|a_crash_at|the_context|create|an_error|many_IDs|two_open|errors|capab|probe'
same="$same|a_context|remove_of_(each|deep|prot)|remove_is|close|commit_o(n_other|nly)|commit_of_a_view|^owner|unknown|calls_with"
same="$same|absent|apply_only|a_name|links_of|a_lower|a_directory|are_data|child_looks|an_ID|what_must|view_of"
in_guest new -skip "TestDriver/ext4/a_deep_stack|TestContainerdSuite/128Layers|TestDriverWithXFS/ext4/($same)" ./devmapper/...
in_guest new -run 'TestQuota$' ./overlay
in_guest stable -run 'TestQuota$' ./overlay
in_guest stable -skip TestProcessDiesAtEach ./mount ./devmapper/dm ./devmapper/thin ./devmapper/metadata
in_guest stable -short -run 'TestDriver$/.*/(new_layer|child|commit|remove|view|containerd|closed|two_open|usage|quota)' ./devmapper
