package uniontest

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/treegen"
)

// A change is one thing about a layer that is being built.
type change func(w *builder) error

// builder makes one layer by hand, as an image's unpacker would.
type builder struct {
	dir   string
	ov    string              // the namespace of overlay xattrs: "trusted.overlay."
	times map[string]sys.Time // explicit mtimes
}

// born is the mtime of everything in a layer that no change dated.
var born = sys.Time{Sec: 1_500_000_000, Nsec: 123_456_789}

// build applies changes to the directory dir.
func build(dir, ov string, changes []change) error {
	w := &builder{dir: dir, ov: ov, times: map[string]sys.Time{}}
	for i, c := range changes {
		if err := c(w); err != nil {
			return fmt.Errorf("change %d of layer %s: %w", i+1, filepath.Base(dir), err)
		}
	}
	return w.date()
}

// date gives every file its time, directories after what is in them.
func (w *builder) date() error {
	var all []string
	err := filepath.WalkDir(w.dir, func(p string, _ fs.DirEntry, err error) error {
		all = append(all, p)
		return err
	})
	for i := len(all) - 1; err == nil && i >= 0; i-- {
		at, ok := w.times[all[i]]
		if !ok {
			at = born
		}
		ts := unix.Timespec{Sec: at.Sec, Nsec: int64(at.Nsec)}
		err = unix.UtimesNanoAt(unix.AT_FDCWD, all[i], []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW)
	}
	return err
}

// path returns where p is, its directories made.
func (w *builder) path(p string) string {
	full := filepath.Join(w.dir, p)
	_ = os.MkdirAll(filepath.Dir(full), 0o755) // what goes wrong the next call says
	return full
}

// file is a regular file, or its new content.
func file(p, content string) change {
	return func(w *builder) error { return os.WriteFile(w.path(p), []byte(content), 0o644) }
}

// random is a file of size bytes of the content of a seed.
func random(p string, size int64, seed uint64) change {
	return func(w *builder) error { return os.WriteFile(w.path(p), treegen.Content(seed, size), 0o644) }
}

// sparse is a file of size bytes without data.
func sparse(p string, size int64) change {
	return func(w *builder) error {
		if err := os.WriteFile(w.path(p), nil, 0o644); err != nil {
			return err
		}
		return os.Truncate(w.path(p), size)
	}
}

// data writes content into a file at an offset.
func data(p string, off int64, content string) change {
	return func(w *builder) error {
		f, err := os.OpenFile(w.path(p), os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt([]byte(content), off)
		return err
	}
}

func dir(paths ...string) change {
	return func(w *builder) error {
		for _, p := range paths {
			if err := os.MkdirAll(w.path(p), 0o755); err != nil {
				return err
			}
		}
		return nil
	}
}

func symlink(target, p string) change {
	return func(w *builder) error { return os.Symlink(target, w.path(p)) }
}

func link(old, p string) change {
	return func(w *builder) error { return os.Link(w.path(old), w.path(p)) }
}

// node is a fifo, socket or device; mode has the type.
func node(p string, mode uint32, major, minor uint32) change {
	return func(w *builder) error { return unix.Mknod(w.path(p), mode, int(unix.Mkdev(major, minor))) }
}

// whiteout is a 0/0 device.
func whiteout(paths ...string) change {
	return func(w *builder) error {
		for _, p := range paths {
			if err := unix.Mknod(w.path(p), unix.S_IFCHR, 0); err != nil {
				return err
			}
		}
		return nil
	}
}

// xwhiteout is a whiteout by xattr, in a directory that opaque("x") marks.
func xwhiteout(p string) change {
	return func(w *builder) error {
		if err := os.WriteFile(w.path(p), nil, 0o644); err != nil {
			return err
		}
		return unix.Lsetxattr(w.path(p), w.ov+"whiteout", []byte("y"), 0)
	}
}

// opaque marks a directory: "y" opaque, "x" with xattr whiteouts in it.
func opaque(p, value string) change { return overlay(p, "opaque", value) }

// overlay sets an overlay xattr.
func overlay(p, name, value string) change {
	return func(w *builder) error { return unix.Lsetxattr(w.path(p), w.ov+name, []byte(value), 0) }
}

func xattr(p, name, value string) change {
	return func(w *builder) error { return unix.Lsetxattr(w.path(p), name, []byte(value), 0) }
}

// chmod sets all twelve bits.
func chmod(p string, mode uint32) change {
	return func(w *builder) error { return unix.Chmod(w.path(p), mode) }
}

func chown(p string, uid, gid int) change {
	return func(w *builder) error { return os.Lchown(w.path(p), uid, gid) }
}

func mtime(p string, sec int64, nsec uint32) change {
	return func(w *builder) error {
		w.times[filepath.Join(w.dir, p)] = sys.Time{Sec: sec, Nsec: nsec}
		return nil
	}
}

// all is several changes as one.
func all(changes ...change) change {
	return func(w *builder) error {
		for _, c := range changes {
			if err := c(w); err != nil {
				return err
			}
		}
		return nil
	}
}

// each makes changes of names.
func each(names []string, f func(name string) change) change {
	var cs []change
	for _, n := range names {
		cs = append(cs, f(n))
	}
	return all(cs...)
}

// numbered is prefix0, prefix1, ... for n names.
func numbered(prefix string, n int) []string {
	var names []string
	for i := range n {
		names = append(names, fmt.Sprintf("%s%d", prefix, i))
	}
	return names
}

// parent is the directory of a path in a tree.
func parent(p string) string {
	if i := strings.LastIndexByte(p, '/'); i > 0 {
		return p[:i]
	}
	return "."
}
