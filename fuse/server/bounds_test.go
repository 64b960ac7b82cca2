package server_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/testenv"
	"golang.org/x/sys/unix"
)

// descriptors counts what the server has open.
func (m *mounted) descriptors() int {
	m.t.Helper()
	list, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", m.cmd.Process.Pid))
	must(m.t, err)
	return len(list)
}

// resident is how much memory of its own the server has, in KiB.
func (m *mounted) resident() int {
	m.t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", m.cmd.Process.Pid))
	must(m.t, err)
	_, line, _ := bytes.Cut(b, []byte("\nRssAnon:"))
	line, _, _ = bytes.Cut(line, []byte(" kB"))
	n, err := strconv.Atoi(string(bytes.TrimSpace(line)))
	must(m.t, err)
	return n
}

// The kernel remembers as many names as it has memory for. The server's descriptors
// do not grow with them, and its memory goes back when the kernel forgets.
func TestManyNodesAreBoundedAndForgotten(t *testing.T) {
	testenv.Slow(t)
	dir := dirs(t, "tmpfs")
	const folders, files = 400, 50 // 20,000 files
	for _, layer := range []string{"l", "u"} {
		for d := range folders {
			p := filepath.Join(dir, layer, fmt.Sprintf("folder-%d", d))
			must(t, os.Mkdir(p, 0o755))
			for f := range files / 2 {
				must(t, unix.Mknod(filepath.Join(p, fmt.Sprintf("file-%s-%d", layer, f)), unix.S_IFREG|0o644, 0))
			}
		}
	}
	const maxDirs = 100
	m := serve(t, setup{Dir: dir, Options: policyA, Config: union.Config{MaxDirs: maxDirs}})
	idle, before := m.descriptors(), m.resident()
	seen := 0
	must(t, filepath.WalkDir(m.path(""), func(p string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			seen++
			_, err = e.Info()
		}
		return err
	}))
	if seen != folders*files {
		t.Errorf("%d files, not %d", seen, folders*files)
	}
	const spare = 40 // what is just worked with
	if n := m.descriptors(); n > idle+maxDirs+spare {
		t.Errorf("%d descriptors after the walk, %d before it", n, idle)
	}
	full := m.resident()
	if full < before+1024 {
		t.Fatalf("the server has %d KiB, and had %d: it remembers nothing", full, before)
	}
	must(t, os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0))
	if !raceEnabled { // what the race detector notes of memory stays
		testenv.Eventually(t, "memory is given back", func() bool { return m.resident() < before+(full-before)*3/4 })
	}
	if n := m.descriptors(); n > idle+maxDirs+spare {
		t.Errorf("%d descriptors in the end, %d before", n, idle)
	}
	t.Logf("descriptors: %d, %d; KiB: %d, %d, %d", idle, m.descriptors(), before, full, m.resident())
}

// Files that lose all names that the server knows of and have others kept a
// descriptor each for as long as the kernel remembered them.
func TestDescriptorsOfHardLinksAreBounded(t *testing.T) {
	dir := dirs(t, "tmpfs")
	const many, links, known, kept = 1300, 12, 9, 1024
	path := func(link, file int) string { return fmt.Sprintf("d%02d/%d", link, file) }
	for l := range links {
		must(t, os.Mkdir(filepath.Join(dir, "u", fmt.Sprintf("d%02d", l)), 0o755))
		for i := range many {
			if l == 0 {
				must(t, os.WriteFile(filepath.Join(dir, "u", path(l, i)), []byte(fmt.Sprint(i)), 0o644))
			} else {
				must(t, os.Link(filepath.Join(dir, "u", path(0, i)), filepath.Join(dir, "u", path(l, i))))
			}
		}
	}
	m := serve(t, setup{Dir: dir, Options: policyA})
	before := m.descriptors()
	var st unix.Stat_t
	for l := range links {
		for i := range many {
			must(t, unix.Stat(m.path(path(l, i)), &st))
		}
	}
	for l := range known {
		must(t, os.RemoveAll(m.path(fmt.Sprintf("d%02d", l))))
	}
	if n := m.descriptors(); n > before+kept+100 {
		t.Errorf("%d descriptors, %d before", n, before)
	}
	for i := range many {
		p := m.path(path(known, i))
		must(t, unix.Stat(p, &st))
		if b, err := os.ReadFile(p); err != nil || string(b) != fmt.Sprint(i) || st.Nlink != links-known {
			t.Fatalf("%s: %q, %v, %d links", p, b, err, st.Nlink)
		}
		must(t, os.Link(m.path(path(known+1, i)), m.path(fmt.Sprint("again", i))))
	}
}

// A cache above that writes what it has collected is told when there is no room for a
// part of it: it takes a short write for a whole one, and fsync(2) said that all was well.
func TestWritebackOnAFullUpper(t *testing.T) {
	dir := testenv.FS(t, "tmpfs", testenv.Size(2<<20))
	for _, d := range []string{"l", "u", "w", "m"} {
		must(t, os.Mkdir(filepath.Join(dir, d), 0o755))
	}
	must(t, os.WriteFile(filepath.Join(dir, "fill"), make([]byte, 1700<<10), 0o644))
	m := serve(t, setup{Dir: dir, Options: server.Options{Writeback: true}})
	f, err := os.Create(m.path("f"))
	must(t, err)
	defer f.Close()
	if _, err := f.Write(make([]byte, 900<<10)); err != nil {
		t.Fatalf("the cache does not take it: %v", err)
	}
	if err := f.Sync(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("fsync: %v", err)
	}
}
