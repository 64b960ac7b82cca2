package btrfs

import (
	"bytes"
	"errors"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

// withQuota runs a test once for each kind of accounting.
func withQuota(t *testing.T, test func(h *history, mode ioctl.QuotaMode)) {
	for kind, mode := range map[string]ioctl.QuotaMode{quotaQgroups: ioctl.QuotaFull, quotaSimple: ioctl.QuotaSimple} {
		t.Run(kind, func(t *testing.T) {
			h := fixture(t)
			if h.d.caps.Quota {
				t.Fatal("quota was never switched on, Capabilities.Quota is set")
			}
			err := h.d.EnableQuota(h.ctx, kind)
			if mode == ioctl.QuotaSimple && errdefs.IsUnavailable(err) {
				testenv.Optional(t, "simple quotas need Linux 6.7")
			}
			h.must(err)
			h.must(h.d.EnableQuota(h.ctx, kind)) // is on already
			h.must(h.d.Close())
			test(newHistory(t, h.d.root), mode)
		})
	}
}

func TestQuota(t *testing.T) {
	withQuota(t, func(h *history, _ ioctl.QuotaMode) {
		if !h.d.caps.Quota {
			h.Fatal("quota is on, Capabilities.Quota is not")
		}
		quotaStops(h)
	})
}

func quotaStops(h *history) {
	h.Helper()
	base, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(os.WriteFile(tree+"/large", make([]byte, 4<<20), 0o644))
	h.commit(base)
	r, tree := h.create(base, drivers.CreateOptions{Quota: 8 << 20})
	free, freeTree := h.create(base, drivers.CreateOptions{})
	h.must(writeSynced(tree+"/fits", 2<<20))
	if err := writeSynced(tree+"/too much", 32<<20); !errors.Is(err, syscall.EDQUOT) {
		h.Errorf("32 MiB into a quota of 8: %v, want EDQUOT", err)
	}
	h.must(writeSynced(freeTree+"/f", 32<<20))
	// In the middle of an Apply, too.
	var tar bytes.Buffer
	_, err := layer.WriteTar(h.ctx, &tar, h.d.Diff(h.ctx, base, free), layer.TarOptions{})
	h.must(err)
	err = h.d.Apply(h.ctx, r, &tar, layer.ApplyOptions{})
	if !errors.Is(err, errdefs.ErrResourceExhausted) || !errors.Is(err, syscall.EDQUOT) {
		h.Errorf("apply: %v, want ErrResourceExhausted with EDQUOT", err)
	}
	for _, r := range []drivers.Ref{r, free, base} {
		h.must(h.d.Remove(h.ctx, r.ID))
	}
}

func writeSynced(path string, size int) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = f.Write(noise(7, size))
	return errors.Join(err, f.Sync(), f.Close())
}

// Both kinds of accounting tell what the child wrote, and not what its parent has;
// a diff, which takes a snapshot, changes nothing about that.
func TestUsageByQuota(t *testing.T) {
	withQuota(t, func(h *history, _ ioctl.QuotaMode) {
		base, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
		h.must(writeSynced(tree+"/large", 16<<20))
		h.commit(base)
		r, tree := h.create(base, drivers.CreateOptions{})
		h.must(os.WriteFile(tree+"/own", noise(5, 4<<20), 0o644))
		h.must(h.d.SyncUsage(h.ctx))
		check := func(when string) {
			u, err := h.d.Usage(h.ctx, r)
			if err != nil || u.Bytes < 4<<20 || u.Bytes > 5<<20 || u.Inodes != 1 {
				h.Errorf("%s: %+v, %v; want a bit over %d bytes and 1 inode", when, u, err, 4<<20)
			}
		}
		l, err := h.d.layer(r.ID)
		h.must(err)
		defer l.Close()
		if _, counted, err := l.counted(); !counted || err != nil {
			h.Errorf("the qgroup does not count: %v, %v", counted, err)
		}
		check("active")
		during := 0
		for _, err := range h.d.Diff(h.ctx, base, r) {
			h.must(err)
			h.must(h.d.SyncUsage(h.ctx))
			check("during a diff")
			during++
		}
		if during == 0 {
			h.Error("the diff has nothing")
		}
		h.commit(r)
		u, err := h.d.Usage(h.ctx, r)
		if err != nil || u.Bytes != 4<<20 {
			h.Errorf("committed: %+v, %v; want what it wrote", u, err)
		}
	})
}

// What quota says of what was not flushed yet is old; --sync is for that.
func TestUsageAfterSync(t *testing.T) {
	h := fixture(t, testenv.MountOptions("commit=300"))
	r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
	h.must(h.d.SyncUsage(h.ctx))
	h.must(os.WriteFile(tree+"/f", noise(6, 3<<20), 0o644))
	h.must(h.d.SyncUsage(h.ctx))
	if u, err := h.d.Usage(h.ctx, r); err != nil || u.Bytes != 3<<20 {
		t.Errorf("%+v, %v; want 3 MiB", u, err)
	}
}

func TestEnableQuotaRefuses(t *testing.T) {
	h := fixture(t)
	if err := h.d.EnableQuota(h.ctx, "some"); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), quotaSimple) {
		t.Errorf("%v, want ErrInvalidArgument that names the kinds", err)
	}
	h.must(h.d.EnableQuota(h.ctx, quotaQgroups))
	if err := h.d.EnableQuota(h.ctx, quotaSimple); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the other kind: %v, want ErrFailedPrecondition", err)
	}
}

func statfsUsed(h *history) int64 {
	h.Helper()
	st, err := sys.StatfsPath(h.d.root)
	h.must(err)
	return int64(st.Blocks-st.BlocksFree) * st.BlockSize
}

// The space of a layer is back when WaitFreed returns, and nothing of its qgroup
// is left.
func TestWaitFreed(t *testing.T) {
	withQuota(t, func(h *history, _ ioctl.QuotaMode) {
		root, err := sys.OpenDir(h.d.root)
		h.must(err)
		defer root.Close()
		used := func() int64 {
			h.must(root.SyncFS())
			return statfsUsed(h)
		}
		h.must(h.d.WaitFreed(h.ctx)) // nothing to wait for
		before := used()
		r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
		for i := range 64 {
			h.must(os.WriteFile(tree+"/f"+string(rune('0'+i)), noise(uint64(i), 1<<20), 0o644))
		}
		fs, err := sys.OpenDir(tree)
		h.must(err)
		number, err := ioctl.SubvolID(fs)
		h.must(err)
		fs.Close()
		h.commit(r)
		if n := used(); n < before+64<<20 {
			h.Fatalf("%d bytes used, %d before 64 MiB", n, before)
		}
		h.must(h.d.Remove(h.ctx, r.ID))
		h.must(h.d.WaitFreed(h.ctx))
		if left, err := ioctl.Deleted(root); len(left) > 0 || err != nil {
			h.Errorf("still there: %v, %v", left, err)
		}
		if n := used(); n > before+4<<20 {
			h.Errorf("%d bytes used, %d before", n, before)
		}
		if _, err := ioctl.Qgroup(root, number); !errors.Is(err, syscall.ENOENT) {
			h.Errorf("the qgroup 0/%d is left: %v", number, err)
		}
	})
}

// Before Linux 6.11 the kernel never dropped the qgroup of the snapshot that a diff of
// an active layer takes: each left one for good.
func TestQgroupOfADiffIsDropped(t *testing.T) {
	withQuota(t, func(h *history, _ ioctl.QuotaMode) {
		root, err := sys.OpenDir(h.d.root)
		h.must(err)
		defer root.Close()
		r, _ := h.create(drivers.Ref{}, drivers.CreateOptions{})
		tree, err := h.d.still(h.ctx, r, true)
		h.must(err)
		number, err := ioctl.SubvolID(tree.fd)
		tree.close()
		h.must(err)
		note := h.d.root + "/del/" + qgroupPrefix + strconv.FormatUint(number, 10)
		if _, err := ioctl.Qgroup(root, number); err == nil { // the kernel keeps it for now
			if _, err := os.Stat(note); err != nil {
				h.Error(err)
			}
		}
		h.must(h.d.WaitFreed(h.ctx))
		if _, err := ioctl.Qgroup(root, number); !errors.Is(err, syscall.ENOENT) {
			h.Errorf("the qgroup 0/%d is left: %v", number, err)
		}
		if _, err := os.Stat(note); !os.IsNotExist(err) {
			h.Errorf("the note is left: %v", err)
		}
	})
}

// A qgroup that was dropped after its subvolume's blocks were free, and before the
// transaction that says so, made the accounting of the whole file system inconsistent:
// it counts nothing more until somebody scans.
func TestAccountingStaysRightWhileQgroupsAreDropped(t *testing.T) {
	withQuota(t, func(h *history, mode ioctl.QuotaMode) {
		root, err := sys.OpenDir(h.d.root)
		h.must(err)
		defer root.Close()
		for range 20 {
			r, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
			h.must(writeSynced(tree+"/f", 1<<20))
			h.must(h.d.Remove(h.ctx, r.ID))
			h.must(ioctl.SyncAll(root)) // wakes the cleaner
			for left := []uint64{0}; len(left) > 0; {
				h.must(h.d.dropQgroups(math.MaxInt))
				left, err = ioctl.Deleted(root)
				h.must(err)
			}
			h.must(h.d.dropQgroups(math.MaxInt))
		}
		h.must(h.d.WaitFreed(h.ctx))
		if is, right, err := ioctl.Quota(root); is != mode || !right || err != nil {
			h.Errorf("%s, right: %v, %v", is, right, err)
		}
	})
}

// With qgroups a layer without a quota had that of the layer that it stood on: a
// snapshot has its source's limit.
func TestQuotaIsNotInherited(t *testing.T) {
	withQuota(t, func(h *history, _ ioctl.QuotaMode) {
		base, tree := h.create(drivers.Ref{}, drivers.CreateOptions{Quota: 4 << 20})
		h.must(writeSynced(tree+"/f", 1<<20))
		h.commit(base)
		_, free := h.create(base, drivers.CreateOptions{})
		h.must(writeSynced(free+"/f", 16<<20))
		_, other := h.create(base, drivers.CreateOptions{Quota: 8 << 20})
		h.must(writeSynced(other+"/f", 6<<20))
		if err := writeSynced(other+"/g", 6<<20); !errors.Is(err, syscall.EDQUOT) {
			h.Errorf("12 MiB into a quota of 8: %v, want EDQUOT", err)
		}
		root, err := sys.OpenDir(h.d.root)
		h.must(err)
		defer root.Close()
		h.must(ioctl.SetQuota(root, ioctl.QuotaOff))
		h.create(base, drivers.CreateOptions{})
	})
}

// With qgroups what a diff's snapshot shares with a layer counted for nobody, so that a
// layer of which diffs were made outgrew its quota.
func TestQuotaHoldsBetweenDiffs(t *testing.T) {
	withQuota(t, func(h *history, _ ioctl.QuotaMode) {
		base, tree := h.create(drivers.Ref{}, drivers.CreateOptions{})
		h.must(writeSynced(tree+"/f", 4<<20))
		h.commit(base)
		r, tree := h.create(base, drivers.CreateOptions{Quota: 8 << 20})
		h.must(writeSynced(tree+"/1", 6<<20))
		for range h.d.Diff(h.ctx, base, r) {
			if err := writeSynced(tree+"/2", 6<<20); !errors.Is(err, syscall.EDQUOT) {
				h.Errorf("12 MiB into a quota of 8: %v, want EDQUOT", err)
			}
			break
		}
	})
}
