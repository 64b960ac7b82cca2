package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/archive"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"github.com/opencontainers/go-digest"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/layer"
	"github.com/layerctl/layerctl/snapshot"
)

const (
	diffFiles    = 20_000
	diffChanged  = 10
	smallParent  = 10
	largeParent  = 100_000
	prepareTimes = 100
)

var diffWorkload = workload{
	name:    "diff",
	about:   fmt.Sprintf("Write the layer tar of an active overlay snapshot: %d changed files over a parent of %d; digest included.", diffChanged, diffFiles),
	fixture: both(diffFixture),
	subjects: []subject{
		{name: "layerctl", run: diffOurs},
		{name: "containerd", run: diffContainerd},
	},
}

var usageWorkload = workload{
	name:    "usage",
	about:   "Usage of the same active snapshot.",
	fixture: both(diffFixture),
	subjects: []subject{
		{name: "layerctl", run: ours(usage)},
		{name: "containerd", run: theirs(usage)},
	},
}

var prepareWorkload = workload{
	name: "prepare",
	about: fmt.Sprintf("Prepare, Mounts and Remove of a snapshot over a parent of %d and of %d files, %d times each in turn; the mean of one call is measured inside.",
		smallParent, largeParent, prepareTimes),
	fixture: both(prepareFixture),
	subjects: []subject{
		{name: "layerctl", run: ours(prepare)},
		{name: "containerd", run: theirs(prepare)},
	},
}

type job func(ctx context.Context, s snapshots.Snapshotter) error

// ours runs a job on our store, with the overlay driver.
func ours(f job) func(dir string) error {
	return func(dir string) error {
		return withOurs(dir, func(ctx context.Context, v *snapshot.View) error { return f(ctx, v) })
	}
}

func withOurs(dir string, f func(context.Context, *snapshot.View) error) error {
	ctx := context.Background()
	s, err := layerctl.Open(ctx, filepath.Join(dir, "ours"), layerctl.Options{})
	if err != nil {
		return err
	}
	v, err := s.View("bench", "overlay")
	if err != nil {
		return errors.Join(err, s.Close())
	}
	return errors.Join(f(ctx, v), s.Close())
}

// theirs runs a job on containerd's overlay snapshotter.
func theirs(f job) func(dir string) error {
	return func(dir string) error {
		s, err := overlay.NewSnapshotter(filepath.Join(dir, "containerd"))
		if err != nil {
			return err
		}
		return errors.Join(f(context.Background(), s), s.Close())
	}
}

func both(f job) func(dir string) error {
	return func(dir string) error {
		if err := ours(f)(dir); err != nil {
			return fmt.Errorf("layerctl: %w", err)
		}
		if err := theirs(f)(dir); err != nil {
			return fmt.Errorf("containerd: %w", err)
		}
		return command("sync", "-f", dir)
	}
}

// committed makes a committed snapshot of n files, 100 in a directory.
func committed(ctx context.Context, s snapshots.Snapshotter, name string, n int) error {
	ms, err := s.Prepare(ctx, name+"-active", "")
	if err != nil {
		return err
	}
	err = mount.WithTempMount(ctx, ms, func(root string) error { return fill(root, n) })
	if err != nil {
		return err
	}
	return s.Commit(ctx, name, name+"-active")
}

func fill(root string, n int) error {
	for i := range n {
		d := filepath.Join(root, fmt.Sprintf("d%d/e%d", i/10000, i/100))
		if i%100 == 0 {
			if err := os.MkdirAll(d, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(d, fmt.Sprintf("f%d", i)), fmt.Appendf(nil, "file %d\n", i), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func diffFixture(ctx context.Context, s snapshots.Snapshotter) error {
	if err := committed(ctx, s, "base", diffFiles); err != nil {
		return err
	}
	ms, err := s.Prepare(ctx, "work", "base")
	if err != nil {
		return err
	}
	return mount.WithTempMount(ctx, ms, func(root string) error {
		for i := 0; i < diffFiles; i += diffFiles / diffChanged {
			p := filepath.Join(root, fmt.Sprintf("d%d/e%d/f%d", i/10000, i/100, i))
			if err := os.WriteFile(p, []byte("changed\n"), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
}

func diffOurs(dir string) error {
	return withOurs(dir, func(ctx context.Context, v *snapshot.View) error {
		start := time.Now()
		_, err := layer.WriteTar(ctx, io.Discard, v.Diff(ctx, "base", "work"), layer.TarOptions{})
		own("diff", time.Since(start))
		return err
	})
}

func diffContainerd(dir string) error {
	return theirs(func(ctx context.Context, s snapshots.Snapshotter) error {
		start := time.Now()
		lower, err := s.View(ctx, "lower", "base")
		if err != nil {
			return err
		}
		upper, err := s.Mounts(ctx, "work")
		if err != nil {
			return err
		}
		d := digest.SHA256.Digester()
		err = mount.WithTempMount(ctx, lower, func(a string) error {
			return mount.WithReadonlyTempMount(ctx, upper, func(b string) error { return archive.WriteDiff(ctx, d.Hash(), a, b) })
		})
		own("diff", time.Since(start))
		return errors.Join(err, s.Remove(ctx, "lower"))
	})(dir)
}

func usage(ctx context.Context, s snapshots.Snapshotter) error {
	start := time.Now()
	_, err := s.Usage(ctx, "work")
	own("usage", time.Since(start))
	return err
}

func prepareFixture(ctx context.Context, s snapshots.Snapshotter) error {
	return errors.Join(committed(ctx, s, "small", smallParent), committed(ctx, s, "large", largeParent))
}

func prepare(ctx context.Context, s snapshots.Snapshotter) error {
	took := map[string]time.Duration{}
	timedIn := func(what string, f func() error) error {
		start := time.Now()
		err := f()
		took[what] += time.Since(start)
		return err
	}
	for range prepareTimes {
		for _, parent := range []string{"small", "large"} {
			err := errors.Join(
				timedIn(parent+" prepare", func() error { _, err := s.Prepare(ctx, "k", parent); return err }),
				timedIn(parent+" mounts", func() error { _, err := s.Mounts(ctx, "k"); return err }),
				timedIn(parent+" remove", func() error { return s.Remove(ctx, "k") }),
			)
			if err != nil {
				return err
			}
		}
	}
	for what, d := range took {
		own(what, d/prepareTimes)
	}
	if c, ok := s.(snapshots.Cleaner); ok {
		return c.Cleanup(ctx)
	}
	return nil
}
