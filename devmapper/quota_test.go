package devmapper

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// room is the size of the file system that a layer shows.
func (b *bench) room(r drivers.Ref) (bytes int64) {
	b.Helper()
	b.edit(r, func(dir string) {
		s, err := sys.StatfsPath(dir)
		b.check(err)
		bytes = int64(s.Blocks) * s.BlockSize
	})
	return bytes
}

// A Create of a layer that is larger than its parent is stopped, or its process killed,
// at each of its steps: no layer is there of another size than was asked for, and
// what is left is removed.
func TestGrowthStoppedAtEachStep(t *testing.T) {
	for _, c := range []struct {
		fs     string
		killed []bool
	}{{"ext4", []bool{false, true}}, {"xfs", []bool{true}}} {
		t.Run(c.fs, func(t *testing.T) {
			b := newBench(t, 1<<30, map[string]string{"filesystem": c.fs, "size": "320MiB"})
			base := b.create(1)
			b.write(base, "base", "base")
			b.commit(base)
			injected := &os.PathError{Op: "injected", Path: "step", Err: syscall.EIO}
			for _, killed := range c.killed {
				for n := 0; ; n++ {
					r, reached := drivers.Ref{ID: drivers.ID(100 + n), Parents: []drivers.ID{1}}, false
					what := fmt.Sprintf("step %d, killed %v", n, killed)
					if killed {
						reached = b.died(b.start(child{Root: b.root, Step: n, Op: "grow", ID: r.ID, Base: 1}))
					} else {
						var err error
						reached, err = steps(t.Context(), n, func() error { return injected }, func(ctx context.Context) error {
							return b.Create(ctx, r, drivers.CreateOptions{Quota: 600 * mib})
						})
						if errors.Is(err, injected) != reached {
							t.Fatalf("%s: %v", what, err)
						}
					}
					if _, err := b.layer(r.ID); reached != errors.Is(err, syscall.ENOENT) {
						t.Errorf("%s: the layer: %v", what, err)
					}
					b.remove(r.ID)
					b.nothingLoose(what)
					b.check(b.Create(t.Context(), r, drivers.CreateOptions{Quota: 600 * mib}))
					if has := b.room(r); has < 500*mib || has > 600*mib {
						t.Errorf("%s: done again it has %d bytes", what, has)
					}
					b.file(r, "base", "base")
					b.remove(r.ID)
					if !reached {
						if n < 4 {
							t.Errorf("only %d steps", n)
						}
						break
					}
				}
			}
			b.remove(1)
		})
	}
}

// Without the capability that the kernel asks of who makes an ext4 larger the driver has no
// quotas, and says why.
func TestNoQuotaWithoutTheCapability(t *testing.T) {
	b := newBench(t, 512*mib, map[string]string{"filesystem": "ext4", "size": "320MiB"})
	if c := b.Capabilities(); !c.Quota || c.LeastQuota != 320*mib {
		t.Errorf("with it: %+v", c)
	}
	if b.died(b.start(child{Root: b.root, Step: -1, Op: "bounded", Drop: "sys_resource"})) {
		t.Error("died")
	}
}

func (d *driver) refusesQuota(ctx context.Context) error {
	if c := d.Capabilities(); c.Quota || c.LeastQuota != 0 {
		return fmt.Errorf("capabilities: %+v", c)
	}
	err := d.Create(ctx, drivers.Ref{ID: 7}, drivers.CreateOptions{Quota: 600 * mib})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "CAP_SYS_RESOURCE") {
		return fmt.Errorf("create: %w", err)
	}
	return nil
}

// The diff between layers of different sizes, or of a grown one's child, is by blocks like any
// other: by far more than there was room for descriptors of, too.
func TestDiffOfGrownLayers(t *testing.T) {
	b := newBench(t, 768*mib, map[string]string{"filesystem": "ext4", "size": "64MiB"})
	base := b.create(1)
	b.write(base, "base", "base")
	b.commit(base)
	grown := drivers.Ref{ID: 2, Parents: []drivers.ID{1}}
	b.check(b.Create(t.Context(), grown, drivers.CreateOptions{Quota: 100 << 30}))
	b.edit(grown, func(dir string) {
		for i := range 300 {
			b.check(os.WriteFile(fmt.Sprintf("%s/f%d", dir, i), []byte("x"), 0o644))
		}
	})
	b.commit(grown)
	child := b.create(3, 2, 1)
	b.write(child, "f7", "changed")
	for _, c := range []struct {
		from, to drivers.Ref
		most     int
	}{{grown, child, 10}, {base, child, 320}, {child, base, 320}, {grown, base, 320}} {
		b.check(b.lookAt(t.Context(), c.from, func(from seen) error {
			return b.lookAt(t.Context(), c.to, func(to seen) error {
				names, err := b.candidates(t.Context(), from.volume, to.volume)
				if err == nil && (names.Len() == 0 || names.Len() > c.most) {
					t.Errorf("from %s to %s: %d candidates", c.from.ID, c.to.ID, names.Len())
				}
				return err
			})
		}))
	}
	if got := strings.Join(b.diffOf(base, child), " "); !strings.HasPrefix(got, ". f0 f1 f10 ") {
		t.Errorf("diff to what has grown: %s", got)
	}
	b.remove(3, 2, 1)
}

// containerd's label of a size is a hint: below the parent's size the layer is made as large
// as that.
func TestMaxSizeLabelBelowTheParents(t *testing.T) {
	needsDM(t)
	var said []string
	s, err := snapshot.Open(t.Context(), testenv.FS(t, "ext4", testenv.Size(512*mib)), snapshot.Options{
		Registry: drivers.NewRegistry(Factory()), Log: func(m string) { said = append(said, m) },
		DriverOptions: map[string]map[string]string{Name: {"size": "320MiB"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	v, err := s.View("v", Name)
	if err == nil {
		_, err = v.Prepare(t.Context(), "small", "", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: "104857600"}))
	}
	if err != nil {
		t.Fatal(err)
	}
	if len(said) != 1 || !strings.Contains(said[0], "335544320") {
		t.Errorf("said: %q", said)
	}
	if err := v.Create(t.Context(), "strict", "", snapshot.CreateOptions{Quota: 100 * mib}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a quota that is no hint: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
