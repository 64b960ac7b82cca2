package devmapper

import (
	"encoding/binary"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/drivers"
	"github.com/layerctl/layerctl/drivers/drivertest"
	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/layer"
)

// kind is the file system that a layer shows, by its mount.
func (b *bench) kind(r drivers.Ref) (name string) {
	b.Helper()
	ms, err := b.Mounts(b.Context(), r, drivers.MountOptions{})
	b.check(err)
	b.edit(r, func(dir string) {
		s, err := sys.StatfsPath(dir)
		b.check(err)
		switch s.Type {
		case 0xef53:
			name = "ext4"
		case 0x58465342:
			name = "xfs"
		}
	})
	if ms[0].Type != name {
		b.Errorf("layer %s: mounts say %s, it is %s", r.ID, ms[0].Type, name)
	}
	return name
}

func (b *bench) diffOf(from, to drivers.Ref) (paths []string) {
	b.Helper()
	for c, err := range b.Diff(b.Context(), from, to) {
		b.check(err)
		paths = append(paths, c.Entry.Path)
	}
	return paths
}

// One pool has layers of both file systems: a layer's is its parent's, a first
// layer's the one that the driver was opened for.
func TestLayersOfBothFileSystems(t *testing.T) {
	t.Setenv(envFS, "")
	b := newBench(t, 768*mib, nil)
	first := b.create(1)
	b.write(first, "f", "ext4")
	b.commit(first)
	for round := range 2 { // the second finds what the first made
		b.check(b.Close())
		b.reopen(map[string]string{"filesystem": "xfs"})
		base := b.create(drivers.ID(10 + round))
		b.write(base, "f", "xfs")
		b.commit(base)
	}
	second, child, below := drivers.Ref{ID: 10}, b.create(2, 10), b.create(3, 1)
	empty := drivers.Ref{ID: 4}
	b.check(b.Create(t.Context(), empty, drivers.CreateOptions{ReadOnly: true}))
	b.check(b.Close())
	b.reopen(nil)
	ofPool := b.create(5)
	for r, want := range map[drivers.ID]string{1: "ext4", 3: "ext4", 5: "ext4", 10: "xfs", 11: "xfs", 2: "xfs", 4: "xfs"} {
		if got := b.kind(drivers.Ref{ID: r}); got != want {
			t.Errorf("layer %s has %s, want %s", r, got, want)
		}
	}
	b.write(child, "g", "child")
	if got := b.diffOf(second, child); !slices.Equal(got, []string{".", "g"}) {
		t.Errorf("diff within xfs: %v", got)
	}
	if got := b.diffOf(first, child); !slices.Equal(got, []string{".", "f", "g"}) {
		t.Errorf("diff between the two: %v", got)
	}
	u, err := b.Usage(t.Context(), ofPool)
	if err != nil || u.Bytes > mib {
		t.Errorf("usage of an empty layer: %+v, %v", u, err)
	}
	if u, err = b.Usage(t.Context(), drivers.Ref{ID: 11}); err != nil || u.Bytes == 0 || u.Bytes > 4*mib {
		t.Errorf("usage of a layer without parent that is not of the default file system: %+v, %v", u, err)
	}
	b.remove(5, 4, 2, below.ID, 11, 10, 1)
	if left := b.thins(); len(left) != 2 {
		t.Errorf("left in the pool: %v, want the two templates", left)
	}
}

// What mkfs.xfs writes in zeros takes no space of the pool.
func TestXFSTemplateIsSmall(t *testing.T) {
	b := newBench(t, 512*mib, map[string]string{"filesystem": "xfs"})
	s, err := b.pool.Status()
	b.check(err)
	if used := int64(s.DataUsed) * b.pool.BlockBytes(); used > 8*mib {
		t.Errorf("a new pool holds %d bytes", used)
	}
}

// The log of an xfs that is mounted is never empty, and files that are deleted and
// still open are in it: a commit leaves one that nobody needs to look at.
func TestCommitOfMountedXFS(t *testing.T) {
	b := newBench(t, 768*mib, map[string]string{"filesystem": "xfs"})
	base := b.create(1)
	dir, unmount := b.mount(base)
	b.check(os.WriteFile(dir+"/open", []byte(strings.Repeat("x", mib)), 0o644))
	f, err := os.Open(dir + "/open")
	b.check(err)
	b.check(os.Remove(dir + "/open"))
	b.check(os.Mkdir(dir+"/d", 0o700))
	b.check(os.WriteFile(dir+"/d/kept", []byte("kept"), 0o644))
	want, err := drivertest.Collect(t.Context(), layer.DiffTrees(t.Context(), "", dir, layer.DiffOptions{}))
	b.check(err)
	b.commit(base)
	b.check(os.WriteFile(dir+"/late", nil, 0o644)) // goes on, for itself
	f.Close()
	unmount()
	got, err := drivertest.Collect(t.Context(), b.Diff(t.Context(), drivers.Ref{}, base))
	b.check(err)
	if msg := got.Differs(want); msg != "" {
		t.Error(msg)
	}
	b.file(base, "d/kept", "kept")
	b.remove(1)
}

// A kernel like 6.1 makes an ext4 larger that has fewer blocks reserved for descriptors than a
// quarter of its journal has, which is of 4096 blocks.
func TestReservedDescriptorsFitTheJournal(t *testing.T) {
	testenv.AnyKernel(t)
	f, err := knownFS("ext4")
	if err != nil {
		t.Fatal(err)
	}
	for _, bytes := range []int64{f.least, 1 << 30, 8 << 30, defaultSize, 100 << 30} {
		file := t.TempDir() + "/disk"
		err := errors.Join(os.WriteFile(file, nil, 0o600), os.Truncate(file, bytes))
		if err == nil {
			err = f.run(t.Context(), file, bytes)
		}
		if err != nil {
			t.Fatal(err)
		}
		disk, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		var reserved [2]byte
		const at = 1024 + 0xCE // s_reserved_gdt_blocks
		_, err = disk.ReadAt(reserved[:], at)
		disk.Close()
		if n := binary.LittleEndian.Uint16(reserved[:]); err != nil || n > 1000 {
			t.Errorf("%d bytes: %d blocks are reserved, %v", bytes, n, err)
		}
	}
	for bytes, want := range map[int64]string{5 << 40: "resize=2415919104", 14 << 40: "resize=4294967296", mostBytes: ""} {
		if all := strings.Join(f.args(bytes), " "); !strings.Contains(all, want) || strings.Contains(all, "resize=") != (want != "") {
			t.Errorf("%d bytes: %s, want %q", bytes, all, want)
		}
	}
}

// older puts a mke2fs before the real one that is too old for an option.
func older(t *testing.T) {
	t.Helper()
	dir := testenv.Scratch(t)
	text := "#!/bin/sh\necho 'mke2fs 1.46.2 (28-Feb-2021)' >&2\necho 'Bad option(s) specified: assume_storage_prezeroed=1' >&2\nexit 1\n"
	if err := os.WriteFile(dir+"/mke2fs", []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

// A program that is too old for what it is told is found before anything is made with it.
func TestProgramThatIsTooOld(t *testing.T) {
	testenv.AnyKernel(t)
	for _, f := range fileSystems {
		if err := f.tryProgram(t.Context()); err != nil {
			t.Errorf("%s as it is here: %v", f.program, err)
		}
	}
	older(t)
	err := fileSystems[0].tryProgram(t.Context())
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "1.47 or newer") || !strings.Contains(err.Error(), "Bad option(s) specified: assume") {
		t.Errorf("an old one: %v", err)
	}
	for _, feature := range Probe(t.Context(), t.TempDir()).Features {
		if feature.Feature == "mke2fs" && (feature.Answer != kprobe.No || !strings.Contains(feature.Detail, "too old")) {
			t.Errorf("probe: %+v", feature)
		}
	}
}

// A pool that was made while there was only one that is too old has its template made later.
func TestOpenWithAnOldProgram(t *testing.T) {
	needsDM(t)
	testenv.Leaks(t)
	root := testenv.FS(t, "ext4", testenv.Size(512*mib)) + "/r"
	t.Run("old", func(t *testing.T) {
		older(t)
		_, err := Open(t.Context(), drivers.Config{Root: root, Options: map[string]string{"filesystem": "ext4"}})
		if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "too old") {
			t.Errorf("open: %v", err)
		}
	})
	d, err := Open(t.Context(), drivers.Config{Root: root, Options: map[string]string{"filesystem": "ext4"}})
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{T: t, driver: d.(*driver)}
	b.remove(b.create(1).ID)
	b.nothingLoose("the first open")
	b.check(b.Close())
}

func TestFileSystemErrors(t *testing.T) {
	for options, words := range map[[2]string]string{
		{"filesystem", "zfs"}:  "ext4, xfs",
		{"size", "100MiB"}:     "300 MiB",
		{"size", "1073741823"}: "", // is rounded
	} {
		m := map[string]string{"filesystem": "xfs", options[0]: options[1]}
		_, err := parseOptions(m)
		if words == "" {
			if err != nil {
				t.Errorf("%v: %v", m, err)
			}
		} else if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), words) {
			t.Errorf("%v: %v", m, err)
		}
	}
	f := fileSystem{program: "mkfs.none", from: "none-progs"}
	if _, err := f.find(); !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "none-progs") {
		t.Error(err)
	}
}
