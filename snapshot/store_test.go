package snapshot_test

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/internal/faults"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

func withHook(ctx context.Context, h faults.Hook) context.Context { return faults.With(ctx, h) }

func openErr(root string, changes ...func(*snapshot.Options)) error {
	o := snapshot.Options{Registry: registry()}
	for _, c := range changes {
		c(&o)
	}
	s, err := snapshot.Open(context.Background(), root, o)
	if err == nil {
		_ = s.Close()
	}
	return err
}

func readOnly(o *snapshot.Options) { o.ReadOnly = true }

func TestOpenRefusals(t *testing.T) {
	dir := testenv.Scratch(t)
	mk := func(name string, files map[string]string) string {
		p := filepath.Join(dir, name)
		must(t, os.Mkdir(p, 0o755))
		for f, text := range files {
			must(t, os.WriteFile(filepath.Join(p, f), []byte(text), 0o644))
		}
		return p
	}
	for _, c := range []struct {
		name, root string
		want       error
		says       string
		o          []func(*snapshot.Options)
	}{
		{"a newer format", mk("newer", map[string]string{"store.json": `{"format": 7}`}), errdefs.ErrFailedPrecondition, "format 7, this program knows formats up to 1", nil},
		{"no number", mk("none", map[string]string{"store.json": `{}`}), errdefs.ErrFailedPrecondition, "store.json", nil},
		{"no JSON", mk("text", map[string]string{"store.json": "x"}), errdefs.ErrFailedPrecondition, "store.json", nil},
		{"something else", mk("else", map[string]string{"holiday.jpg": ""}), errdefs.ErrFailedPrecondition, "holiday.jpg", nil},
		{"a lost store.json", mk("lost", map[string]string{"db.bolt": ""}), errdefs.ErrDataLoss, "store.json", nil},
		{"a damaged database", mk("damaged", map[string]string{"store.json": `{"format":1}`, "db.bolt": strings.Repeat("x", 1<<15)}), errdefs.ErrDataLoss, "database", nil},
		{"a file", func() string { p := filepath.Join(dir, "file"); must(t, os.WriteFile(p, nil, 0o644)); return p }(), errdefs.ErrFailedPrecondition, "not a directory", nil},
		{"nothing, read-only", filepath.Join(dir, "nothing"), errdefs.ErrNotFound, "no store", []func(*snapshot.Options){readOnly}},
	} {
		t.Run(c.name, func(t *testing.T) {
			err := openErr(c.root, c.o...)
			wants(t, err, c.want)
			if err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v: does not say %q", err, c.says)
			}
		})
	}
}

// TestHalfMadeStore: whatever a crash left of making a store, the next Open
// makes it.
func TestHalfMadeStore(t *testing.T) {
	for _, left := range []string{"", "store.json.77", "locks", "db.lock"} {
		root := testenv.Scratch(t)
		if left != "" {
			must(t, os.WriteFile(filepath.Join(root, left), nil, 0o600))
		}
		clean(t, open(t, root))
	}
}

func TestReadOnlyStore(t *testing.T) {
	root := seedStore(t, "native")
	before := contentOf(t, root)
	s := open(t, root, readOnly)
	v := view(t, s, "v", "native")
	equal(t, "keys", keys(t, v), []string{"base"})
	equal(t, "diff", diff(t, v, "", "base"), []string{"A .", "A a", "A d", "A d/b"})
	_, err := v.Prepare(t.Context(), "x", "base")
	wants(t, err, syscall.EROFS)
	wants(t, err, errdefs.ErrFailedPrecondition)
	wants(t, v.Remove(t.Context(), "base"), errdefs.ErrFailedPrecondition)
	clean(t, s)
	if after := contentOf(t, root); after != before {
		t.Errorf("the store changed: %s, was %s", after, before)
	}
}

// contentOf is the names, sizes and times of the store's own files.
func contentOf(t *testing.T, root string) string {
	entries, err := os.ReadDir(root)
	must(t, err)
	var all []string
	for _, e := range entries {
		i, err := e.Info()
		must(t, err)
		all = append(all, e.Name()+" "+i.ModTime().String())
	}
	b, err := json.Marshal(all)
	must(t, err)
	return string(b)
}

// TestReadOnlyFileSystem: the error says so, and reading works.
func TestReadOnlyFileSystem(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs")
	root := filepath.Join(dir, "store")
	s := open(t, root)
	layerOf(t, view(t, s, "v", "native"), "base", "", map[string]string{"a": "1"})
	must(t, s.Close())
	must(t, syscall.Mount("", dir, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""))
	err := openErr(root)
	wants(t, err, syscall.EROFS)
	wants(t, err, errdefs.ErrFailedPrecondition)
	err = openErr(filepath.Join(dir, "new"))
	wants(t, err, syscall.EROFS)
	equal(t, "keys", keys(t, view(t, open(t, root, readOnly), "v", "native")), []string{"base"})
}

// TestDamagedDatabase: whatever is overwritten in db.bolt, calls end in an
// error, or in the truth.
func TestDamagedDatabase(t *testing.T) {
	testenv.Slow(t)
	root := seedStore(t, "native")
	whole, err := os.ReadFile(filepath.Join(root, "db.bolt"))
	must(t, err)
	used := min(len(whole), 64<<10)
	for off := 0; off < used; off += 1024 {
		broken := append([]byte(nil), whole...)
		copy(broken[off:], strings.Repeat("\xff\x00\x7f", 200))
		must(t, os.WriteFile(filepath.Join(root, "db.bolt"), broken, 0o600))
		o := snapshot.Options{Registry: registry(), NoListings: true}
		s, err := snapshot.Open(t.Context(), root, o)
		if err != nil {
			wants(t, err, errdefs.ErrDataLoss)
			continue
		}
		v := view(t, s, "v", "native")
		_, _ = v.Stat(t.Context(), "base")
		_, _ = v.Prepare(t.Context(), "x", "base")
		_, _ = s.Check(t.Context(), snapshot.CheckOptions{})
		_ = s.Close()
	}
}

// TestFullDisk: nothing is lost and nothing half-made stays; with room again all
// goes on.
func TestFullDisk(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "tmpfs", testenv.Size(8<<20))
	s := open(t, filepath.Join(dir, "store"))
	v := view(t, s, "v", "native")
	layerOf(t, v, "base", "", map[string]string{"a": "1"})
	must(t, s.FinishListings(t.Context()))
	ballast := filepath.Join(dir, "ballast")
	fill(t, ballast)
	var err error
	made := 0
	for i := range 500 {
		if _, err = v.Prepare(t.Context(), "x"+string(rune('0'+i%10))+strings.Repeat("k", 1000+i), "base"); err != nil {
			break
		}
		made++
	}
	wants(t, err, errdefs.ErrResourceExhausted)
	wants(t, err, syscall.ENOSPC)
	must(t, os.Remove(ballast))
	if n := len(keys(t, v)); n != made+1 {
		t.Errorf("%d keys after %d prepares", n, made)
	}
	must(t, second(v.Prepare(t.Context(), "again", "base")))
	must(t, v.Commit(t.Context(), "c", "again"))
	must(t, s.Close())
	clean(t, reopen(t, filepath.Join(dir, "store")))
}

func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	must(t, err)
	defer f.Close()
	for block := make([]byte, 4096); err == nil; {
		_, err = f.Write(block)
	}
}

// TestDefaultDriver: chosen once by probing, then kept; a driver that does not
// open says why.
func TestDefaultDriver(t *testing.T) {
	testenv.Root(t)
	root := testenv.Scratch(t)
	s := open(t, root)
	must(t, second(view(t, s, "v", "").Prepare(t.Context(), "x", "")))
	name, err := s.DefaultDriver(t.Context())
	must(t, err)
	if name != "overlay" {
		t.Errorf("default driver %q: root on tmpfs has overlay", name)
	}
	must(t, s.SetDefaultDriver(t.Context(), "native"))
	wants(t, s.SetDefaultDriver(t.Context(), "nothing"), errdefs.ErrNotFound)
	must(t, second(view(t, s, "v", "").Prepare(t.Context(), "y", "")))
	r, err := view(t, s, "v", "").Record(t.Context(), "y")
	must(t, err)
	if r.Driver != "native" {
		t.Errorf("made by %s", r.Driver)
	}
	all, err := s.Drivers(t.Context())
	must(t, err)
	if last := all[len(all)-1]; all[0].Name != "overlay" || all[0].Layers != 1 || last.Name != "native" || !last.Default {
		t.Errorf("drivers: %+v", all)
	}
	must(t, s.Close())
	must(t, s.Close())
	wants(t, second(view(t, s, "v", "").Stat(t.Context(), "x")), errdefs.ErrUnavailable)

	only := func(o *snapshot.Options) { o.Registry = drivers.NewRegistry(native.Factory()) }
	s = open(t, root, only)
	wants(t, second(view(t, s, "v", "").Mounts(t.Context(), "x")), errdefs.ErrNotFound) // no such driver
	found, err := s.Check(t.Context(), snapshot.CheckOptions{})
	must(t, err)
	if len(found) != 1 || found[0].Problem != snapshot.DriverUnknown {
		t.Errorf("found %v", found)
	}
}
