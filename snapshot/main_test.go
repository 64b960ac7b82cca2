package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/layerctl/layerctl/btrfs"
	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/fuse"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/mount"
	"github.com/layerctl/layerctl/overlay"
	"github.com/layerctl/layerctl/snapshot"
)

func TestMain(m *testing.M) {
	if job := os.Getenv("SNAPSHOT_TEST_JOB"); job != "" {
		os.Exit(runJob(job))
	}
	testenv.Main(m, testenv.FUSEServer)
}

func registry() *drivers.Registry {
	return drivers.NewRegistry(overlay.Factory(), btrfs.Factory(), fuse.Factory(), native.Factory())
}

// logs collects what a store says.
type logs struct {
	mu    sync.Mutex
	lines []string
}

func (l *logs) add(m string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, m)
}

func (l *logs) all() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.lines)
}

// open opens a store for the test, which must have found nothing to repair.
func open(t testing.TB, root string, changes ...func(*snapshot.Options)) *snapshot.Store {
	t.Helper()
	s := reopen(t, root, changes...)
	if r := s.Recovered(); len(r) > 0 {
		t.Errorf("recovered: %v", r)
	}
	return s
}

func reopen(t testing.TB, root string, changes ...func(*snapshot.Options)) *snapshot.Store {
	t.Helper()
	o := snapshot.Options{Registry: registry()}
	for _, c := range changes {
		c(&o)
	}
	s, err := snapshot.Open(context.Background(), root, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return s
}

// eachDriver runs a test with a new store for each driver that this user can
// have.
func eachDriver(t *testing.T, f func(t *testing.T, s *snapshot.Store, v *snapshot.View)) {
	for _, driver := range []string{"native", "overlay"} {
		t.Run(driver, func(t *testing.T) {
			if driver == "overlay" {
				testenv.Root(t)
			}
			s := open(t, testenv.Scratch(t))
			f(t, s, view(t, s, "v", driver))
			clean(t, s)
		})
	}
}

func view(t testing.TB, s *snapshot.Store, name, driver string) *snapshot.View {
	t.Helper()
	v, err := s.View(name, driver)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// clean fails the test if a whole check finds anything.
func clean(t testing.TB, s *snapshot.Store) {
	t.Helper()
	if err := s.FinishListings(context.Background()); err != nil {
		t.Error(err)
	}
	found, err := s.Check(context.Background(), snapshot.CheckOptions{})
	if err != nil {
		t.Errorf("check: %v", err)
	}
	for _, f := range found {
		t.Errorf("check found: %v", f)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wants(t testing.TB, err error, sentinel error) {
	t.Helper()
	if !errors.Is(err, sentinel) {
		t.Errorf("got error %v, want one that is %q", err, sentinel)
	}
}

// write changes a snapshot through a mount.
func write(t testing.TB, v *snapshot.View, key string, files map[string]string) {
	t.Helper()
	ms, err := v.MountsWith(t.Context(), key, drivers.MountOptions{})
	must(t, err)
	dir, done, err := reach(t.Context(), ms)
	must(t, err)
	defer done()
	for name, content := range files {
		if content == "" {
			must(t, os.RemoveAll(filepath.Join(dir, name)))
			continue
		}
		must(t, os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755))
		must(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o644))
	}
}

// reach makes mounts reachable: a bind's source needs no mount, and no root.
func reach(ctx context.Context, ms []mount.Mount) (dir string, done func(), err error) {
	if len(ms) == 1 && ms[0].Type == "bind" {
		return ms[0].Source, func() {}, nil
	}
	t, err := mount.Detached(ctx, ms)
	if err != nil {
		return "", nil, err
	}
	return t.Path(), func() { _ = t.Close() }, nil
}

// mountAt mounts a snapshot at a directory.
func mountAt(t testing.TB, v *snapshot.View, key, target string) {
	t.Helper()
	ms, err := v.MountsWith(t.Context(), key, drivers.MountOptions{})
	must(t, err)
	must(t, mount.All(t.Context(), ms, target))
}

// layerOf prepares, writes and commits.
func layerOf(t testing.TB, v *snapshot.View, name, parent string, files map[string]string) {
	t.Helper()
	_, err := v.Prepare(t.Context(), name+"-active", parent)
	must(t, err)
	write(t, v, name+"-active", files)
	must(t, v.Commit(t.Context(), name, name+"-active"))
}

// diff returns the changes of to against from as text.
func diff(t testing.TB, v *snapshot.View, from, to string) (lines []string) {
	t.Helper()
	for c, err := range v.Diff(t.Context(), from, to) {
		must(t, err)
		lines = append(lines, fmt.Sprintf("%c %s", c.Kind, c.Entry.Path))
	}
	return lines
}

func equal[T comparable](t testing.TB, what string, got, want []T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func keys(t testing.TB, v *snapshot.View, fs ...string) (names []string) {
	t.Helper()
	must(t, v.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error {
		names = append(names, i.Name)
		return nil
	}, fs...))
	return names
}
