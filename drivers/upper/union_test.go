package upper_test

import (
	"bytes"
	"context"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/upper"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
	lmount "github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/overlay"
)

func TestMain(m *testing.M) { testenv.Main(m) }

// other stands for a union that is not the kernel's: it maps ids itself, vouches for
// no inode number, and takes either encoding.
type other struct{ plans []upper.Plan }

func (o *other) Mount(p upper.Plan) (mount.Mount, error) {
	o.plans = append(o.plans, p)
	if m, ok := p.Bind(); ok {
		return m, nil
	}
	source := p.Upper
	if source == "" {
		source = p.Lowers[0]
	}
	return mount.Mount{Type: "fuse3.other", Source: source}, nil
}

func (o *other) Merge(ctx context.Context, lowers []string) (upper.Tree, error) {
	m, err := lmount.Detached(ctx, []lmount.Mount{{Type: "overlay", Source: "overlay",
		Options: []string{"metacopy=on", "redirect_dir=on", "lowerdir=" + strings.Join(lowers, ":")}}})
	if err != nil {
		return nil, err
	}
	return m, nil
}

// roots are one root, opened by two drivers.
type roots struct {
	testing.TB
	ctx   context.Context
	kern  *overlay.Driver
	other *upper.Layers
	union *other
	dir   string
	next  drivers.ID
}

func newRoots(t *testing.T) *roots {
	testenv.Leaks(t)
	r := &roots{TB: t, ctx: t.Context(), dir: testenv.FS(t, "ext4"), union: &other{}}
	var err error
	r.kern, err = overlay.Open(r.ctx, drivers.Config{Root: r.dir + "/r"})
	r.check(err)
	root, err := upper.PrepareRoot(r.dir + "/r")
	r.check(err)
	caps := r.kern.Capabilities()
	caps.Driver = "other"
	r.other, err = upper.Open(upper.Config{Root: root, Union: r.union, Capabilities: caps,
		Xattrs: []upper.Xattrs{upper.XattrsUser, upper.XattrsTrusted}, StoredIDs: true})
	r.check(err)
	return r
}

func (r *roots) check(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

func (r *roots) wants(what string, err, want error, says string) {
	r.Helper()
	if !errdefs.IsFailedPrecondition(err) && want == errdefs.ErrFailedPrecondition || err == nil || !strings.Contains(err.Error(), says) {
		r.Fatalf("%s: %v, want %v that says %q", what, err, want, says)
	}
}

func (r *roots) create(d drivers.Driver, parents []drivers.ID, o drivers.CreateOptions) drivers.Ref {
	r.Helper()
	r.next++
	ref := drivers.Ref{ID: r.next, Parents: parents}
	r.check(d.Create(r.ctx, ref, o))
	return ref
}

// edit changes a layer through the kernel's overlay.
func (r *roots) edit(ref drivers.Ref, change func(dir string)) {
	r.Helper()
	ms, err := r.kern.Mounts(r.ctx, ref, drivers.MountOptions{})
	r.check(err)
	m, err := lmount.Detached(r.ctx, ms)
	r.check(err)
	defer m.Close()
	change(m.Path())
}

func (r *roots) tar(d drivers.Differ, from, to drivers.Ref) (string, []string) {
	r.Helper()
	var b bytes.Buffer
	var lines []string
	_, err := layer.WriteTar(r.ctx, &b, func(yield func(layer.Change, error) bool) {
		for c, err := range d.Diff(r.ctx, from, to) {
			lines = append(lines, c.String())
			if !yield(c, err) {
				return
			}
		}
	}, layer.TarOptions{})
	r.check(err)
	return b.String(), lines
}

// A root made by one driver opens under another: what the one made the other lists,
// compares, commits, and the first mounts again.
func TestRootOfAnotherDriver(t *testing.T) {
	testenv.Root(t)
	r := newRoots(t)
	base := r.create(r.kern, nil, drivers.CreateOptions{})
	r.edit(base, func(dir string) {
		r.check(os.MkdirAll(dir+"/d/e", 0o755))
		for _, n := range []string{"/d/e/same", "/d/gone", "/d/touched"} {
			r.check(os.WriteFile(dir+n, []byte("content"), 0o644))
		}
	})
	_, err := r.kern.Commit(r.ctx, base, drivers.CommitOptions{})
	r.check(err)
	child := r.create(r.other, []drivers.ID{base.ID}, drivers.CreateOptions{})
	r.edit(child, func(dir string) {
		r.check(os.Remove(dir + "/d/gone"))
		r.check(os.Chmod(dir+"/d/touched", 0o600))
		r.check(os.Chmod(dir+"/d/e/same", 0o600)) // copied up, and as it was again
		r.check(os.Chmod(dir+"/d/e/same", 0o644))
	})
	for range 2 {
		got, lines := r.tar(r.other, base, child)
		want, wantLines := r.tar(r.kern, base, child)
		if got != want || !slices.Equal(lines, wantLines) || !slices.Equal(lines, []string{"C d (time)", "D d/gone", "C d/touched (mode)"}) {
			t.Errorf("the one says %q, the other %q", wantLines, lines)
		}
		_, err = r.other.Commit(r.ctx, child, drivers.CommitOptions{}) // the second time it is done
	}
	if err == nil {
		t.Error("committed twice")
	}
	grand := r.create(r.kern, []drivers.ID{child.ID, base.ID}, drivers.CreateOptions{})
	r.edit(grand, func(dir string) {
		if _, err := os.Lstat(dir + "/d/gone"); err == nil {
			t.Error("d/gone is there")
		}
	})
	ms, err := r.other.Mounts(r.ctx, grand, drivers.MountOptions{})
	r.check(err)
	if id, ok := r.kern.Owner(ms); !ok || id != grand.ID {
		t.Errorf("whose is %v: %s, %v", ms, id, ok)
	}
	for id, err := range r.kern.IDs(r.ctx) {
		r.check(err)
		r.check(r.other.Remove(r.ctx, id))
	}
}

// An upper with host ids and one with stored ids are not taken for each other.
func TestIDsOfAnotherDriver(t *testing.T) {
	testenv.Root(t)
	r := newRoots(t)
	base := r.create(r.kern, nil, drivers.CreateOptions{})
	_, err := r.kern.Commit(r.ctx, base, drivers.CommitOptions{})
	r.check(err)
	ids := []drivers.IDRange{{ContainerID: 0, HostID: 100_000, Size: 65_536}}
	o := drivers.CreateOptions{IDMap: drivers.IDMap{UIDs: ids, GIDs: ids}}
	ours, theirs := r.create(r.kern, []drivers.ID{base.ID}, o), r.create(r.other, []drivers.ID{base.ID}, o)
	for what, c := range map[string]struct {
		d   drivers.Driver
		ref drivers.Ref
		uid uint32
	}{
		"host ids":   {r.other, ours, 100_000},
		"stored ids": {r.kern, theirs, 0},
	} {
		_, err := c.d.Mounts(r.ctx, c.ref, drivers.MountOptions{})
		r.wants(what, err, errdefs.ErrFailedPrecondition, "another way")
		st, err := sys.StatPath(r.other.Dir(c.ref.ID))
		r.check(err)
		if st.UID != c.uid {
			t.Errorf("%s: the root belongs to %d", what, st.UID)
		}
		if _, lines := r.tar(c.d.(drivers.Differ), base, c.ref); len(lines) > 0 {
			t.Errorf("%s: %q has changed", what, lines)
		}
		_, err = c.d.Commit(r.ctx, c.ref, drivers.CommitOptions{})
		r.check(err)
		if st, err := sys.StatPath(r.other.Dir(c.ref.ID)); err != nil || st.UID != 0 {
			t.Errorf("%s: committed, the root belongs to %d, %v", what, st.UID, err)
		}
	}
}

// What a server holds is in use, whoever looks.
func TestServedIsInUse(t *testing.T) {
	r := newRoots(t)
	ref := r.create(r.kern, nil, drivers.CreateOptions{})
	release, err := lmount.Claim(r.ctx, r.kern.Dir(ref.ID), r.kern.Root()+"/"+ref.ID.String()+"/work")
	r.check(err)
	r.wants("remove of what is written", r.kern.Remove(r.ctx, ref.ID), errdefs.ErrFailedPrecondition, "server")
	release()
	fs, err := sys.OpenDir(r.kern.Dir(ref.ID))
	r.check(err)
	defer fs.Close()
	lock, err := fs.TryLock(sys.LockShared)
	r.check(err)
	r.wants("remove of what is read", r.other.Remove(r.ctx, ref.ID), errdefs.ErrFailedPrecondition, "server")
	lock.Close()
	r.check(r.other.Remove(r.ctx, ref.ID))
}

// What a union is asked to mount.
func TestPlans(t *testing.T) {
	r := newRoots(t)
	base := r.create(r.other, nil, drivers.CreateOptions{})
	child := drivers.Ref{}
	last := func(ref drivers.Ref, o drivers.MountOptions) upper.Plan {
		t.Helper()
		_, err := r.other.Mounts(r.ctx, ref, o)
		r.check(err)
		return r.union.plans[len(r.union.plans)-1]
	}
	if p := last(base, drivers.MountOptions{}); p.Upper != r.other.Dir(base.ID) || len(p.Lowers) != 0 {
		t.Errorf("alone: %+v", p)
	}
	_, err := r.other.Commit(r.ctx, base, drivers.CommitOptions{})
	r.check(err)
	child = r.create(r.other, []drivers.ID{base.ID}, drivers.CreateOptions{})
	p := last(child, drivers.MountOptions{Volatile: true, External: true})
	if p.Upper != r.other.Dir(child.ID) || !strings.HasSuffix(p.Work, "/work") || !slices.Equal(p.Lowers, []string{r.other.Dir(base.ID)}) ||
		!p.Volatile || !p.External || p.Parents != 1 || !p.StoredIDs {
		t.Errorf("writable: %+v", p)
	}
	if p := last(child, drivers.MountOptions{ReadOnly: true}); p.Upper != "" || !slices.Equal(p.Lowers, []string{r.other.Dir(child.ID), r.other.Dir(base.ID)}) {
		t.Errorf("read-only: %+v", p)
	}
}
