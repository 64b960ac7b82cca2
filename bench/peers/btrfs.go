package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/plugins/snapshots/btrfs"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/btrfs/ioctl"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

const largeFiles = 200_000

var btrfsWorkload = workload{
	name: "btrfs",
	about: fmt.Sprintf("Snapshots on btrfs (a loop file of its own): over a parent of %d files prepare a child, change %d, then usage, diff as a tar with digest, commit; "+
		"then remove the child, and a base of %d files made for the run. Commit and remove of layerctl are durable.", diffFiles, diffChanged, diffFiles),
	fixture: func(dir string) error {
		return errors.Join(btrfsFS(dir, "4G"), onBtrfs(dir, true, fill20k), onBtrfs(dir, false, fill20k), command("sync", "-f", dir+"/fs"))
	},
	subjects: []subject{
		{name: "layerctl", before: idleBtrfs, run: func(dir string) error { return onBtrfs(dir, true, btrfsRound) }},
		{name: "containerd", before: idleBtrfs, run: func(dir string) error { return onBtrfs(dir, false, btrfsRound) }},
		{name: "one snapshot, by ioctl", before: idleBtrfs, run: bareSnapshot},
	},
	done: func(dir string) error { return command("umount", dir+"/fs") },
}

var btrfsLargeWorkload = workload{
	name:  "btrfs-large",
	about: fmt.Sprintf("layerctl alone: the same over a parent of %d files, and 1,000 snapshots of one base, the first and the last ten of them.", largeFiles),
	fixture: func(dir string) error {
		return errors.Join(btrfsFS(dir, "5G"), onBtrfs(dir, true, func(ctx context.Context, s snapshots.Snapshotter) error {
			return committed(ctx, s, "base", largeFiles)
		}), command("sync", "-f", dir+"/fs"))
	},
	subjects: []subject{
		{name: "layerctl", run: func(dir string) error { return onBtrfs(dir, true, btrfsChild) }},
		{name: "layerctl, 1,000 snapshots", run: func(dir string) error { return onBtrfs(dir, true, btrfsMany) }},
	},
	done: func(dir string) error { return command("umount", dir+"/fs") },
}

// btrfsQuota is the workload of a child with accounting of a kind switched on.
func btrfsQuota(kind string) workload {
	return workload{
		name:  "btrfs-" + kind,
		about: fmt.Sprintf("layerctl alone: a child of %d files as above, %d changed, with quota of the kind %q on.", diffFiles, diffChanged, kind),
		fixture: func(dir string) error {
			return errors.Join(btrfsFS(dir, "4G"), onBtrfs(dir, true, func(ctx context.Context, s snapshots.Snapshotter) error {
				return errors.Join(fill20k(ctx, s), s.(*snapshot.View).Store().EnableQuota(ctx, "btrfs", kind))
			}), command("sync", "-f", dir+"/fs"))
		},
		subjects: []subject{{name: "layerctl", run: func(dir string) error { return onBtrfs(dir, true, btrfsChild) }}},
		done:     func(dir string) error { return command("umount", dir+"/fs") },
	}
}

// bareSnapshot is what every prepare has in it: one snapshot of layerctl's base, by
// the one request; and a second one, as it is in a process that has just made one.
func bareSnapshot(dir string) error {
	into, err := sys.OpenDir(dir + "/fs")
	if err != nil {
		return err
	}
	defer into.Close()
	source, err := sys.OpenDir(dir + "/fs/ours/drivers/btrfs/l/1/ro")
	if err != nil {
		return err
	}
	defer source.Close()
	name := func(i int) string { return fmt.Sprintf("bare%d", i) }
	if err := prepares(func(i int) error { return ioctl.Snapshot(source, into, name(i), false) }); err != nil {
		return err
	}
	for i := range morePrepares + 1 {
		err = errors.Join(err, ioctl.Destroy(into, name(i)))
	}
	return err
}

const morePrepares = 20

// prepares measures the first of a process and the median of more, which are what a
// service that is up does.
func prepares(f func(i int) error) error {
	if err := timed("prepare", func() error { return f(0) }); err != nil {
		return err
	}
	took := make([]time.Duration, morePrepares)
	for i := range took {
		start := time.Now()
		if err := f(i + 1); err != nil {
			return err
		}
		took[i] = time.Since(start)
	}
	slices.Sort(took)
	own("prepare again", took[morePrepares/2])
	return nil
}

// idleBtrfs waits until what the run before removed is gone: the kernel frees it in the
// background, which whoever comes next would pay for.
func idleBtrfs(dir string) error {
	return errors.Join(command("btrfs", "subvolume", "sync", dir+"/fs"), command("sync", "-f", dir+"/fs"))
}

// btrfsFS mounts a file system of its own at dir/fs.
func btrfsFS(dir, size string) error {
	for _, c := range [][]string{
		{"truncate", "-s", size, dir + "/img"},
		{"mkfs.btrfs", "-q", "-K", dir + "/img"},
		{"mkdir", dir + "/fs"},
		{"mount", "-o", "loop", dir + "/img", dir + "/fs"},
	} {
		if err := command(c...); err != nil {
			return err
		}
	}
	return nil
}

// onBtrfs runs a job on our store, with the btrfs driver, or on containerd's
// btrfs snapshotter.
func onBtrfs(dir string, ours bool, f job) error {
	ctx := context.Background()
	if !ours {
		root := filepath.Join(dir, "fs/containerd")
		if err := os.MkdirAll(root, 0o700); err != nil {
			return err
		}
		s, err := btrfs.NewSnapshotter(root)
		if err != nil {
			return err
		}
		return errors.Join(f(ctx, s), s.Close())
	}
	s, err := layerctl.Open(ctx, filepath.Join(dir, "fs/ours"), layerctl.Options{})
	if err != nil {
		return err
	}
	v, err := s.View("bench", "btrfs")
	if err != nil {
		return errors.Join(err, s.Close())
	}
	if _, err := s.Driver(ctx, "btrfs"); err != nil { // opened before, as containerd's is
		return errors.Join(err, s.Close())
	}
	return errors.Join(f(ctx, v), s.Close())
}

func fill20k(ctx context.Context, s snapshots.Snapshotter) error {
	return committed(ctx, s, "base", diffFiles)
}

// timed measures one call.
func timed(what string, f func() error) error {
	start := time.Now()
	err := f()
	own(what, time.Since(start))
	return err
}

// btrfsChild prepares, changes, measures, diffs, commits and removes a child.
func btrfsChild(ctx context.Context, s snapshots.Snapshotter) error {
	key := func(i int) string { return fmt.Sprintf("work%d", i) }
	err := prepares(func(i int) error { _, err := s.Prepare(ctx, key(i), "base"); return err })
	if err != nil {
		return err
	}
	for i := range morePrepares {
		if err := removed(ctx, s, key(i+1)); err != nil {
			return err
		}
	}
	work := key(0)
	ms, err := s.Mounts(ctx, work)
	if err != nil {
		return err
	}
	err = mount.WithTempMount(ctx, ms, func(root string) error {
		for i := 0; i < diffFiles; i += diffFiles / diffChanged {
			p := filepath.Join(root, fmt.Sprintf("d%d/e%d/f%d", i/10000, i/100, i))
			if err := os.WriteFile(p, []byte("changed\n"), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return errors.Join(
		timed("usage", func() error { _, err := s.Usage(ctx, work); return err }),
		timed("diff", func() error { return diffOf(ctx, s, work, ms) }),
		timed("commit", func() error { return s.Commit(ctx, "done", work) }),
		timed("remove child", func() error { return removed(ctx, s, "done") }),
	)
}

// diffOf writes the layer of the child as a tar and takes its digest.
func diffOf(ctx context.Context, s snapshots.Snapshotter, key string, upper []mount.Mount) error {
	d := digest.SHA256.Digester()
	if v, ok := s.(*snapshot.View); ok {
		_, err := layer.WriteTar(ctx, io.Discard, v.Diff(ctx, "base", key), layer.TarOptions{})
		return err
	}
	lower, err := s.View(ctx, "lower", "base")
	if err != nil {
		return err
	}
	err = mount.WithTempMount(ctx, lower, func(a string) error {
		return mount.WithReadonlyTempMount(ctx, upper, func(b string) error { return archive.WriteDiff(ctx, d.Hash(), a, b) })
	})
	return errors.Join(err, s.Remove(ctx, "lower"))
}

// removed removes a snapshot, its bytes too.
func removed(ctx context.Context, s snapshots.Snapshotter, key string) error {
	if err := s.Remove(ctx, key); err != nil {
		return err
	}
	if c, ok := s.(snapshots.Cleaner); ok {
		return c.Cleanup(ctx)
	}
	return nil
}

func btrfsRound(ctx context.Context, s snapshots.Snapshotter) error {
	if err := btrfsChild(ctx, s); err != nil {
		return err
	}
	if err := committed(ctx, s, "other", diffFiles); err != nil {
		return err
	}
	return timed("remove base", func() error { return removed(ctx, s, "other") })
}

// btrfsMany makes 1,000 snapshots of one base.
func btrfsMany(ctx context.Context, s snapshots.Snapshotter) error {
	const n = 1000
	for i := range n {
		what := ""
		if i < 10 {
			what = "first"
		} else if i >= n-10 {
			what = "last"
		}
		key := fmt.Sprintf("many%d", i)
		start := time.Now()
		if _, err := s.Prepare(ctx, key, "base"); err != nil {
			return err
		}
		prepared := time.Now()
		if _, err := s.Usage(ctx, key); err != nil {
			return err
		}
		if what != "" {
			own(what+" prepare", prepared.Sub(start))
			own(what+" usage", time.Since(prepared))
		}
	}
	start := time.Now()
	for i := range n {
		if err := s.Remove(ctx, fmt.Sprintf("many%d", i)); err != nil {
			return err
		}
	}
	err := s.(snapshots.Cleaner).Cleanup(ctx)
	own("remove of one", time.Since(start)/n)
	return err
}
