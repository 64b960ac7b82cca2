package image_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/native"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/overlay"
	"github.com/layerctl/layerctl/snapshot"
)

// eachDriver runs a test with a new snapshot store for each driver that this
// user can have; the store must be clean afterwards.
func eachDriver(t *testing.T, f func(t *testing.T, v *snapshot.View)) {
	for _, driver := range []string{"native", "overlay"} {
		t.Run(driver, func(t *testing.T) {
			if driver == "overlay" {
				testenv.Root(t)
			}
			f(t, newView(t, driver))
		})
	}
}

func newView(t testing.TB, driver string) *snapshot.View {
	t.Helper()
	return openView(t, testenv.Scratch(t), driver)
}

func openView(t testing.TB, root, driver string) *snapshot.View {
	t.Helper()
	s, err := snapshot.Open(t.Context(), root, snapshot.Options{Registry: drivers.NewRegistry(overlay.Factory(), native.Factory())})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if found, err := s.Check(context.Background(), snapshot.CheckOptions{}); err != nil || len(found) > 0 {
			t.Errorf("check of the snapshots: %v %v", found, err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	v, err := s.View("cli", driver)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// keys lists the snapshots of a view.
func keys(t testing.TB, v *snapshot.View) []string {
	t.Helper()
	list, err := v.Records(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range list {
		names = append(names, r.Key)
	}
	return names
}

// listSnapshot is listTree of a snapshot, mounted.
func listSnapshot(t testing.TB, v *snapshot.View, key string) string {
	t.Helper()
	tree, err := v.Tree(t.Context(), key)
	if err != nil {
		t.Fatal(err)
	}
	defer tree.Close()
	return listTree(t, tree.Path())
}

// listTree describes a tree as find(1) and getfattr(1) see it: a line for each
// file, its xattrs, the digest of its content and the group of its hard links.
func listTree(t testing.TB, dir string) string {
	t.Helper()
	getfattr := testenv.Program(t, "getfattr", "attr")
	lines, nlinks := map[string]string{}, map[string]string{}
	inodes := map[string]string{} // the first name of each inode
	var names []string
	for _, rec := range strings.Split(run(t, dir, "find", ".", "-printf", `%p\t%y %m %U:%G %T@ %l\t%s\t%n %i\0`), "\x00") {
		f := strings.Split(rec, "\t")
		if len(f) != 4 {
			continue
		}
		names = append(names, f[0])
		nlinks[f[0]] = f[3]
		lines[f[0]] = f[1]
		if f[1][0] == 'f' {
			b, err := os.ReadFile(filepath.Join(dir, f[0]))
			if err != nil {
				t.Fatal(err)
			}
			sum := sha256.Sum256(b)
			lines[f[0]] += " " + f[2] + " " + hex.EncodeToString(sum[:8])
		}
	}
	slices.Sort(names)
	for _, n := range names {
		ino := nlinks[n]
		if !strings.HasPrefix(ino, "1 ") && lines[n][0] != 'd' {
			if inodes[ino] == "" {
				inodes[ino] = n
			}
			lines[n] += " = " + inodes[ino]
		}
	}
	var b strings.Builder
	for _, n := range names {
		fmt.Fprintf(&b, "%q %s\n", n, lines[n])
	}
	b.WriteString(run(t, dir, getfattr, "-R", "-h", "-P", "-d", "-m", "-", "-e", "hex", "."))
	return sortXattrs(b.String())
}

// sortXattrs: getfattr walks in the order of the directory.
func sortXattrs(s string) string {
	files, attrs, _ := strings.Cut(s, "# file: ")
	blocks := strings.Split(attrs, "\n\n")
	for i, b := range blocks {
		blocks[i] = strings.TrimPrefix(b, "# file: ")
	}
	slices.Sort(blocks)
	return files + strings.Join(blocks, "\n")
}

// run runs a program in dir, which may be a descriptor of ours, and returns what
// it printed.
func run(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, errs.String())
	}
	return out.String()
}

// diffLines tells where two listings differ.
func diffLines(a, b string) string {
	count := map[string]int{}
	for l := range strings.Lines(a) {
		count[l]--
	}
	for l := range strings.Lines(b) {
		count[l]++
	}
	var out strings.Builder
	for _, l := range slices.Sorted(maps.Keys(count)) {
		if n := count[l]; n != 0 {
			fmt.Fprintf(&out, "%+d %s", n, l)
		}
	}
	return out.String()
}
