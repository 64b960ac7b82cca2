package snapshot_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/layerctl/layerctl/internal/testenv"
	"github.com/layerctl/layerctl/snapshot"
)

// TestRemoveOnFullDisk: on a file system filled to the last byte, or to the last
// name, snapshots can be removed and their bytes freed, by a process that was
// there before and by one that comes then, one after the other.
func TestRemoveOnFullDisk(t *testing.T) {
	testenv.Slow(t)
	testenv.Root(t)
	for _, fs := range []string{"ext4", "xfs", "btrfs", "tmpfs"} {
		for _, with := range []string{"bytes", "names"} {
			if fs == "tmpfs" && with == "names" {
				continue // they take no blocks there
			}
			for _, driver := range []string{"overlay", "native"} {
				t.Run(fs+"/"+with+"/"+driver, func(t *testing.T) {
					removeOnFullDisk(t, testenv.FS(t, fs, fullSize[fs]), fs, with, driver)
				})
			}
		}
	}
}

// fullSize is the smallest that mkfs takes, or a little more.
var fullSize = map[string]testenv.Option{
	"ext4": testenv.Size(32 << 20), "xfs": testenv.Size(320 << 20), "btrfs": testenv.Size(128 << 20), "tmpfs": testenv.Size(16 << 20),
}

func removeOnFullDisk(t *testing.T, dir, fs, with, driver string) {
	root := filepath.Join(dir, "store")
	s := open(t, root)
	v := view(t, s, "v", driver)
	layerOf(t, v, "base", "", map[string]string{"a": "1", "sub/b": "2"})
	must(t, s.FinishListings(t.Context()))
	const layers = 6
	for i := range layers {
		must(t, second(v.Prepare(t.Context(), fmt.Sprint("w", i), "base")))
	}
	if with == "bytes" {
		fillBytes(t, dir)
	} else {
		fillNames(t, dir, fs)
	}
	for i := range layers {
		if i == layers/2 {
			must(t, s.Close())
			s = reopen(t, root, func(o *snapshot.Options) { o.NoListings = true })
			v = view(t, s, "v", driver)
		}
		must(t, v.Remove(t.Context(), fmt.Sprint("w", i)))
		if i%2 == 1 {
			r, err := s.GC(t.Context())
			must(t, err)
			if r.Layers != 2 || len(r.Left) > 0 {
				t.Fatalf("gc: %+v", r)
			}
		}
	}
	clean(t, s)
	equal(t, "keys", keys(t, v), []string{"base"})
}

// fillBytes writes until not one byte goes in, in large files and then in small
// ones.
func fillBytes(t *testing.T, dir string) {
	t.Helper()
	block := make([]byte, 1<<20)
	rand.NewChaCha8([32]byte{1}).Read(block) // some file systems compress, or keep no zeros
	for i, n := range []int{1 << 20, 64 << 10, 4096, 512, 1} {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint("ballast", i)))
		if errors.Is(err, syscall.ENOSPC) {
			return
		}
		must(t, err)
		for err == nil {
			_, err = f.Write(block[:n])
		}
		_ = f.Sync()
		f.Close()
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
}

// fillNames makes names until none goes in: what they take is metadata. An xattr
// of nearly a node of btrfs's tree makes that quick.
func fillNames(t *testing.T, dir, fs string) {
	t.Helper()
	must(t, os.Mkdir(filepath.Join(dir, "ballast"), 0o755))
	if fs != "btrfs" { // which would give the rest to data
		var st syscall.Statfs_t
		must(t, syscall.Statfs(dir, &st))
		f, err := os.Create(filepath.Join(dir, "ballast", "most"))
		must(t, err)
		must(t, syscall.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-8<<20))
		f.Close()
	}
	value := make([]byte, 15_000)
	for i := 0; ; i++ {
		path := filepath.Join(dir, "ballast", fmt.Sprint(i))
		err := os.Mkdir(path, 0o755)
		if err == nil && fs == "btrfs" {
			err = syscall.Setxattr(path, "user.ballast", value, 0)
			value[0]++
		}
		if errors.Is(err, syscall.ENOSPC) {
			return
		}
		must(t, err)
		if i > 1<<20 {
			t.Fatal("it is never full")
		}
	}
}

// TestReserveComesBack: the reserve is spent by a removal that needs it and there
// again when room was made; a store in which nothing is missing keeps its hands
// off it.
func TestReserveComesBack(t *testing.T) {
	testenv.Root(t)
	dir := testenv.FS(t, "btrfs", fullSize["btrfs"])
	root := filepath.Join(dir, "store")
	reserve := func() int64 {
		var st syscall.Stat_t
		if err := syscall.Stat(filepath.Join(root, "db.reserve"), &st); err != nil {
			return 0
		}
		return st.Blocks * 512
	}
	s := open(t, root)
	v := view(t, s, "v", "overlay")
	layerOf(t, v, "base", "", map[string]string{"a": "1"})
	must(t, s.FinishListings(t.Context()))
	must(t, second(v.Prepare(t.Context(), "w", "base")))
	if n := reserve(); n != 4<<20 {
		t.Fatalf("reserve of %d bytes", n)
	}
	fillBytes(t, dir)
	must(t, v.Remove(t.Context(), "w"))
	if n := reserve(); n != 0 {
		t.Errorf("reserve of %d bytes on a full disk after a removal", n)
	}
	must(t, os.Remove(filepath.Join(dir, "ballast0")))
	must(t, second(s.GC(context.Background())))
	if n := reserve(); n != 4<<20 {
		t.Errorf("reserve of %d bytes after gc", n)
	}
	if spent, err := s.MakeRoom(t.Context()); err != nil || !spent {
		t.Errorf("%v %v", spent, err)
	}
	if spent, err := s.MakeRoom(t.Context()); err != nil || spent {
		t.Errorf("again: %v %v", spent, err)
	}
}
