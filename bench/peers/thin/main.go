// Command thin measures the driver devmapper beside containerd's devmapper
// snapshotter, each on a thin pool of its own on files of one kind, through the same
// interface. It needs device-mapper and dmsetup: run it in a guest (CONTRIBUTING.md,
// "Other kernels").
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	peer "github.com/containerd/containerd/v2/plugins/snapshots/devmapper"
	"github.com/containerd/continuity/fs"

	"github.com/layerctl/layerctl"
	"github.com/layerctl/layerctl/snapshot"
)

const (
	rounds = 30
	burst  = 100
)

var (
	files = flag.Int("files", 20000, "in the base")
	only  = flag.String("only", "", "layerctl or containerd")
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "thin:", err)
		os.Exit(1)
	}
}

func run() error {
	dir, err := os.MkdirTemp("", "thin")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	ctx := namespaces.WithNamespace(context.Background(), "bench")
	for name, open := range map[string]func(context.Context, string) (snapshots.Snapshotter, func() error, error){"layerctl": ours, "containerd": theirs} {
		if *only != "" && *only != name {
			continue
		}
		root := filepath.Join(dir, name)
		if err := os.Mkdir(root, 0o755); err != nil {
			return err
		}
		s, done, err := open(ctx, root)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		err = errors.Join(measure(ctx, name, s, dir), done())
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func ours(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	s, err := layerctl.Open(ctx, root+"/store", layerctl.Options{})
	if err != nil {
		return nil, nil, err
	}
	v, err := s.View("bench", "devmapper")
	return v, s.Close, err
}

// theirs makes a pool as containerd's documentation does.
func theirs(ctx context.Context, root string) (snapshots.Snapshotter, func() error, error) {
	const pool = "containerd-pool"
	os.Setenv("DM_DISABLE_UDEV", "1") // a guest has none: dmsetup makes the nodes
	script := `set -e
truncate -s 10G data; truncate -s 64M metadata
D=$(losetup --find --show data); M=$(losetup --find --show metadata)
dmsetup create ` + pool + ` --table "0 $(blockdev --getsz $D) thin-pool $M $D 128 32768 1 skip_block_zeroing"`
	cmd := exec.Command("/bin/sh", "-c", script)
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return nil, nil, fmt.Errorf("%w: %s", err, out)
	}
	s, err := peer.NewSnapshotter(ctx, &peer.Config{RootPath: root + "/snapshots", PoolName: pool, BaseImageSize: "10GB", BaseImageSizeBytes: 10 << 30, FileSystemType: "ext4"})
	if err != nil {
		return nil, nil, err
	}
	return s, func() error {
		err := s.Close()
		return errors.Join(err, exec.Command("/bin/sh", "-c", "dmsetup remove_all; losetup -D").Run())
	}, nil
}

type table struct{ name string }

func (t table) row(what string, all []time.Duration) {
	slices.Sort(all)
	ms := func(i int) float64 { return float64(all[i].Microseconds()) / 1000 }
	fmt.Printf("%-12s %-38s %9.2f (%.2f..%.2f) ms\n", t.name, what, ms(len(all)/2), ms(0), ms(len(all)-1))
}

func timed(f func() error) (time.Duration, error) {
	start := time.Now()
	err := f()
	return time.Since(start), err
}

func measure(ctx context.Context, name string, s snapshots.Snapshotter, dir string) error {
	t := table{name}
	target := filepath.Join(dir, "m")
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := base(ctx, s, target); err != nil {
		return err
	}
	if err := lives(ctx, t, s, target); err != nil {
		return err
	}
	if err := many(ctx, t, s); err != nil {
		return err
	}
	return changes(ctx, t, s, dir)
}

// base makes the layer of many files.
func base(ctx context.Context, s snapshots.Snapshotter, target string) error {
	ms, err := s.Prepare(ctx, "base-active", "")
	if err != nil {
		return err
	}
	err = in(ms, target, func(dir string) error {
		for i := range *files {
			d := fmt.Sprintf("%s/d%d", dir, i/100)
			if i%100 == 0 {
				if err := os.Mkdir(d, 0o755); err != nil {
					return err
				}
			}
			if err := os.WriteFile(fmt.Sprintf("%s/f%d", d, i), []byte(strings.Repeat("x", 1000)), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	return s.Commit(ctx, "base", "base-active")
}

func in(ms []mount.Mount, target string, f func(dir string) error) error {
	if err := mount.All(ms, target); err != nil {
		return err
	}
	err := f(target)
	return errors.Join(err, mount.UnmountAll(target, 0))
}

// lives measures the steps of a snapshot's life one after another.
func lives(ctx context.Context, t table, s snapshots.Snapshotter, target string) error {
	steps := map[string][]time.Duration{}
	order := []string{"prepare", "usage, active", "commit", "remove (and cleanup)"}
	for i := range rounds {
		key, name := fmt.Sprintf("a%d", i), fmt.Sprintf("c%d", i)
		var ms []mount.Mount
		for _, what := range order {
			d, err := timed(func() (err error) {
				switch what {
				case "prepare":
					ms, err = s.Prepare(ctx, key, "base")
				case "usage, active":
					_, err = s.Usage(ctx, key)
				case "commit":
					err = s.Commit(ctx, name, key)
				default:
					if err = s.Remove(ctx, name); err == nil {
						if c, ok := s.(snapshots.Cleaner); ok {
							err = c.Cleanup(ctx)
						}
					}
				}
				return err
			})
			if err != nil {
				return fmt.Errorf("%s: %w", what, err)
			}
			steps[what] = append(steps[what], d)
			if what == "prepare" {
				if err := in(ms, target, func(dir string) error { return os.WriteFile(dir+"/new", []byte("x"), 0o644) }); err != nil {
					return err
				}
			}
		}
	}
	for _, what := range order {
		t.row(what, steps[what])
	}
	return nil
}

// many prepares many at once.
func many(ctx context.Context, t table, s snapshots.Snapshotter) error {
	var wg sync.WaitGroup
	errs := make([]error, burst)
	d, _ := timed(func() error {
		for i := range burst {
			wg.Go(func() { _, errs[i] = s.Prepare(ctx, fmt.Sprintf("many%d", i), "base") })
		}
		wg.Wait()
		return nil
	})
	t.row(fmt.Sprintf("%d prepares at once, all", burst), []time.Duration{d})
	for i := range burst {
		if err := s.Remove(ctx, fmt.Sprintf("many%d", i)); err != nil {
			return err
		}
	}
	return errors.Join(errs...)
}

// changes measures the diff of ten changes.
func changes(ctx context.Context, t table, s snapshots.Snapshotter, dir string) error {
	target := filepath.Join(dir, "m")
	ms, err := s.Prepare(ctx, "changed", "base")
	if err != nil {
		return err
	}
	err = in(ms, target, func(dir string) error {
		for i := range 10 {
			if err := os.WriteFile(fmt.Sprintf("%s/d%d/f%d", dir, i, i*100), []byte("changed"), 0o644); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	var all []time.Duration
	for range 3 {
		d, err := timed(func() error { return diff(ctx, s, dir) })
		if err != nil {
			return err
		}
		all = append(all, d)
	}
	t.row(fmt.Sprintf("diff of 10 changes over %d files", *files), all)
	return nil
}

// diff is ours where the snapshotter has one, and containerd's double walk.
func diff(ctx context.Context, s snapshots.Snapshotter, dir string) error {
	if v, ok := s.(*snapshot.View); ok {
		n := 0
		for _, err := range v.Diff(ctx, "base", "changed") {
			if err != nil {
				return err
			}
			n++
		}
		if n != 10 {
			return fmt.Errorf("%d changes", n)
		}
		return nil
	}
	lower, err := s.View(ctx, "lower", "base")
	if err != nil {
		return err
	}
	upper, err := s.Mounts(ctx, "changed")
	if err != nil {
		return err
	}
	a, b := filepath.Join(dir, "a"), filepath.Join(dir, "b")
	if err := errors.Join(os.MkdirAll(a, 0o755), os.MkdirAll(b, 0o755)); err != nil {
		return err
	}
	err = in(lower, a, func(a string) error {
		return in(upper, b, func(b string) error {
			return fs.Changes(ctx, a, b, func(fs.ChangeKind, string, os.FileInfo, error) error { return nil })
		})
	})
	return errors.Join(err, s.Remove(ctx, "lower"))
}
