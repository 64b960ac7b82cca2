package testenv

import (
	"encoding/binary"
	"os"
	"strconv"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/internal/sys"
)

// What every btrfs of FS is like, for runs of whole suites on other profiles than
// the default: `make test-btrfs-profiles`.
const (
	envBtrfsMkfs  = "LAYERCTL_BTRFS_MKFS"  // arguments of mkfs.btrfs, where a test has none of its own
	envBtrfsMount = "LAYERCTL_BTRFS_MOUNT" // mount options, beside the test's own
	envBtrfsQuota = "LAYERCTL_BTRFS_QUOTA" // qgroups, or simple
	envBtrfsFree  = "LAYERCTL_BTRFS_FREE"  // MiB that are left free, on file systems that have more
)

func (o *fsOptions) btrfsProfile() {
	if args := strings.Fields(os.Getenv(envBtrfsMkfs)); len(args) > 0 && len(o.mkfs) == 0 {
		o.mkfs = args
		o.size = max(o.size, 256<<20) // two copies of everything
	}
	if m := os.Getenv(envBtrfsMount); m != "" {
		o.mount = append(strings.Split(m, ","), o.mount...)
	}
}

// finishBtrfs switches on and fills what the environment asks for.
func finishBtrfs(t testing.TB, dir string) {
	t.Helper()
	fd, err := sys.OpenDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer fd.Close()
	if kind := os.Getenv(envBtrfsQuota); kind != "" {
		const quotaCtl = 0xc0109428 // BTRFS_IOC_QUOTA_CTL: u64 cmd, u64 status
		b := make([]byte, 16)
		binary.LittleEndian.PutUint64(b, map[string]uint64{"qgroups": 1, "simple": 4}[kind])
		if err := fd.Ioctl("BTRFS_IOC_QUOTA_CTL", quotaCtl, b); err != nil {
			t.Fatalf("%s=%s: %v", envBtrfsQuota, kind, err)
		}
		if kind == "qgroups" {
			const rescanWait = 0x942e // BTRFS_IOC_QUOTA_RESCAN_WAIT
			if err := fd.Ioctl("BTRFS_IOC_QUOTA_RESCAN_WAIT", rescanWait, nil); err != nil {
				t.Fatal(err)
			}
		}
	}
	if text := os.Getenv(envBtrfsFree); text != "" {
		fill(t, fd, text)
	}
}

// fill leaves so many MiB to data, in a file that one call can make.
func fill(t testing.TB, root *sys.Fd, mib string) {
	t.Helper()
	free, err := strconv.ParseInt(mib, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", envBtrfsFree, err)
	}
	st, err := root.Statfs()
	if err != nil {
		t.Fatal(err)
	}
	size := int64(st.BlocksUser)*st.BlockSize - free<<20
	if size <= 0 {
		return
	}
	f, err := root.Openat(".filler", sys.O_WRONLY|sys.O_CREAT, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Allocate(size); err != nil {
		t.Fatal(err)
	}
}
