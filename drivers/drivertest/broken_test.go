package drivertest_test

import (
	"context"
	"fmt"
	"io"
	"iter"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/mount"
)

func TestMain(m *testing.M) { drivertest.Main(m) }

// envBroken makes TestBrokenDriver be the test of one broken driver.
const envBroken = "LAYERCTL_DRIVERTEST_BROKEN"

// broken is native with one mistake. It delegates the rest.
type broken struct {
	drivers.Driver
	mistake mistake
}

func (b *broken) Diff(ctx context.Context, from, to drivers.Ref) iter.Seq2[layer.Change, error] {
	changes := b.Driver.(drivers.Differ).Diff(ctx, from, to)
	if b.mistake.diff != nil {
		return b.mistake.diff(changes)
	}
	return changes
}

func (b *broken) Apply(ctx context.Context, r drivers.Ref, tar io.Reader, o layer.ApplyOptions) error {
	return b.Driver.(drivers.Applier).Apply(ctx, r, tar, o)
}

func (b *broken) Create(ctx context.Context, r drivers.Ref, o drivers.CreateOptions) error {
	if b.mistake.create != nil {
		return b.mistake.create(ctx, b.Driver, r, o)
	}
	return b.Driver.Create(ctx, r, o)
}

func (b *broken) Commit(ctx context.Context, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
	if b.mistake.commit != nil {
		return b.mistake.commit(ctx, b.Driver, r, o)
	}
	return b.Driver.Commit(ctx, r, o)
}

func (b *broken) Mounts(ctx context.Context, r drivers.Ref, o drivers.MountOptions) ([]mount.Mount, error) {
	ms, err := b.Driver.Mounts(ctx, r, o)
	if b.mistake.mounts != nil && err == nil {
		ms = b.mistake.mounts(ms)
	}
	return ms, err
}

func (b *broken) Usage(ctx context.Context, r drivers.Ref) (drivers.Usage, error) {
	u, err := b.Driver.Usage(ctx, r)
	if b.mistake.usage != nil {
		u = b.mistake.usage(u)
	}
	return u, err
}

func (b *broken) Remove(ctx context.Context, id drivers.ID) error {
	err := b.Driver.Remove(ctx, id)
	if b.mistake.remove != nil {
		return b.mistake.remove(err)
	}
	return err
}

func (b *broken) Owner(ms []mount.Mount) (drivers.ID, bool) {
	id, ok := b.Driver.Owner(ms)
	if b.mistake.owner != nil {
		return b.mistake.owner(id, ok)
	}
	return id, ok
}

func (b *broken) Capabilities() drivers.Capabilities {
	c := b.Driver.Capabilities()
	if b.mistake.caps != nil {
		b.mistake.caps(&c)
	}
	return c
}

func (b *broken) IDs(ctx context.Context) iter.Seq2[drivers.ID, error] {
	if b.mistake.ids != nil {
		return b.mistake.ids(b.Driver.IDs(ctx))
	}
	return b.Driver.IDs(ctx)
}

// mistake is one way to be wrong, and the case that has to see it.
type mistake struct {
	name string
	seen string // a case, as -run spells it
	fs   string // "" means tmpfs

	create func(ctx context.Context, d drivers.Driver, r drivers.Ref, o drivers.CreateOptions) error
	commit func(ctx context.Context, d drivers.Driver, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error)
	diff   func(iter.Seq2[layer.Change, error]) iter.Seq2[layer.Change, error]
	mounts func([]mount.Mount) []mount.Mount
	usage  func(drivers.Usage) drivers.Usage
	remove func(error) error
	owner  func(drivers.ID, bool) (drivers.ID, bool)
	caps   func(*drivers.Capabilities)
	ids    func(iter.Seq2[drivers.ID, error]) iter.Seq2[drivers.ID, error]
}

// without drops changes from a diff.
func without(drop func(*layer.Change) bool) func(iter.Seq2[layer.Change, error]) iter.Seq2[layer.Change, error] {
	return func(changes iter.Seq2[layer.Change, error]) iter.Seq2[layer.Change, error] {
		return func(yield func(layer.Change, error) bool) {
			for c, err := range changes {
				if err == nil && drop(&c) {
					continue
				}
				if !yield(c, err) {
					return
				}
			}
		}
	}
}

var mistakes = []mistake{
	{name: "diff without xattr-only changes", seen: "exact_xattrs",
		diff: without(func(c *layer.Change) bool { return c.Aspects == layer.AspectXattr })},
	{name: "diff that trusts size and mtime", seen: "exact_same_size",
		diff: without(func(c *layer.Change) bool { return c.Aspects == layer.AspectContent })},
	{name: "diff without deletions of links", seen: "exact_hard_links_added",
		diff: without(func(c *layer.Change) bool { return c.Aspects == layer.AspectHardlink })},
	{name: "diff without directory times", seen: "exact_times",
		diff: without(func(c *layer.Change) bool { return c.Entry.IsDir() && c.Aspects == layer.AspectTime })},
	{name: "diff with wrong aspects", seen: "exact_modes",
		diff: func(cs iter.Seq2[layer.Change, error]) iter.Seq2[layer.Change, error] {
			return func(yield func(layer.Change, error) bool) {
				for c, err := range cs {
					c.Aspects &^= layer.AspectMode
					if !yield(c, err) {
						return
					}
				}
			}
		}},
	{name: "committed layers mounted writable", seen: "committed_layers",
		mounts: func(ms []mount.Mount) []mount.Mount {
			for i := range ms {
				ms[i].Options = slices.DeleteFunc(ms[i].Options, func(o string) bool { return o == "ro" })
			}
			return ms
		}},
	{name: "commit that commits nothing", seen: "commit_only_once",
		commit: func(ctx context.Context, d drivers.Driver, r drivers.Ref, _ drivers.CommitOptions) (drivers.Usage, error) {
			return d.Usage(ctx, r)
		}},
	{name: "commit that flushes nothing", seen: "a_commit_survives", fs: "ext4",
		commit: func(ctx context.Context, d drivers.Driver, r drivers.Ref, _ drivers.CommitOptions) (drivers.Usage, error) {
			return d.Commit(ctx, r, drivers.CommitOptions{Volatile: true})
		}},
	{name: "create that takes an ID twice", seen: "create_of_what_exists",
		create: func(ctx context.Context, d drivers.Driver, r drivers.Ref, o drivers.CreateOptions) error {
			if err := d.Create(ctx, r, o); !errdefs.IsAlreadyExists(err) {
				return err
			}
			return nil
		}},
	{name: "create without the parent", seen: "child_looks_like",
		create: func(ctx context.Context, d drivers.Driver, r drivers.Ref, o drivers.CreateOptions) error {
			r.Parents = nil
			return d.Create(ctx, r, o)
		}},
	{name: "an error that wraps nothing", seen: "absent_layer",
		create: func(ctx context.Context, d drivers.Driver, r drivers.Ref, o drivers.CreateOptions) error {
			return d.Create(ctx, r, o)
		},
		commit: func(ctx context.Context, d drivers.Driver, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
			u, err := d.Commit(ctx, r, o)
			if err != nil {
				err = fmt.Errorf("%v", err)
			}
			return u, err
		}},
	{name: "an error that two sentinels claim", seen: "an_error_at_each",
		commit: func(ctx context.Context, d drivers.Driver, r drivers.Ref, o drivers.CommitOptions) (drivers.Usage, error) {
			u, err := d.Commit(ctx, r, o)
			if err != nil {
				err = fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
			}
			return u, err
		}},
	{name: "usage without inodes", seen: "usage_counts_what",
		usage: func(u drivers.Usage) drivers.Usage { return drivers.Usage{Bytes: u.Bytes, Inodes: 1} }},
	{name: "removal that is silent about mounts", seen: "remove_of_a_mounted", remove: func(error) error { return nil }},
	{name: "owner that guesses", seen: "owner_of_what_is_not", owner: func(id drivers.ID, _ bool) (drivers.ID, bool) { return id, true }},
	{name: "owner that knows nothing", seen: "owner_is_the_inverse", owner: func(drivers.ID, bool) (drivers.ID, bool) { return 0, false }},
	{name: "a difference that is not one", seen: "a_lower_hard_link", caps: func(c *drivers.Capabilities) { c.BreaksHardLinks = true }},
	{name: "another difference that is not one", seen: "a_directory_of_the_parent", caps: func(c *drivers.Capabilities) { c.DirRenameEXDEV = true }},
	{name: "a must that is missing", seen: "what_must_be", caps: func(c *drivers.Capabilities) { c.IDMap = false }},
	{name: "IDs that hide a layer", seen: "a_crash_at_each", ids: func(all iter.Seq2[drivers.ID, error]) iter.Seq2[drivers.ID, error] {
		return func(yield func(drivers.ID, error) bool) {
			for id, err := range all {
				if id > 1 && !yield(id, err) { // hides the parent
					return
				}
			}
		}
	}},
	{name: "diff that random operations see", seen: "random_operations",
		diff: without(func(c *layer.Change) bool { return c.Kind == layer.Deleted })},
}

// TestBrokenDriver shows that the suite can fail: each mistake is seen by the
// case that is there for it, and the driver without mistakes by none.
func TestBrokenDriver(t *testing.T) {
	if name, ok := os.LookupEnv(envBroken); ok {
		testBroken(t, name)
		return
	}
	testenv.Root(t)
	for _, m := range append([]mistake{{seen: "(owner|usage)"}}, mistakes...) {
		t.Run(m.name, func(t *testing.T) { m.mustBeSeen(t) })
	}
}

func (m mistake) mustBeSeen(t *testing.T) {
	kind := m.fs
	if kind == "" {
		kind = "tmpfs"
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^TestBrokenDriver$/^"+kind+"$/"+m.seen, "-test.v")
	cmd.Env = append(os.Environ(), envBroken+"="+m.name, "LAYERCTL_FS="+kind)
	out, err := cmd.CombinedOutput()
	switch failed := strings.Contains(string(out), "--- FAIL: TestBrokenDriver/"+kind+"/"); {
	case m.name == "" && err != nil:
		t.Errorf("no mistake, yet: %v\n%s", err, out)
	case m.name != "" && !failed:
		t.Errorf("not seen (%v):\n%s", err, out)
	}
}

func testBroken(t *testing.T, name string) {
	var m mistake
	if i := slices.IndexFunc(mistakes, func(m mistake) bool { return m.name == name }); i >= 0 {
		m = mistakes[i]
	}
	f := native.Factory()
	open := f.Open
	f.Open = func(ctx context.Context, c drivers.Config) (drivers.Driver, error) {
		d, err := open(ctx, c)
		return &broken{d, m}, err
	}
	drivertest.Run(t, drivertest.Config{Factory: f, RootOnly: true, Must: []string{"IDMap"}})
}
