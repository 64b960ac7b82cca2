package layer

import (
	"archive/tar"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
)

// treeState describes a tree without the code under test: os and syscall walk
// it. path -> everything that a layer says of it, link groups as the set of
// names.
func treeState(t testing.TB, dir string) map[string]string {
	t.Helper()
	state := map[string]string{}
	groups := map[[2]uint64][]string{}
	err := walkFiles(dir, ".", func(p string, st *syscall.Stat_t) error {
		if st.Mode&syscall.S_IFMT == syscall.S_IFSOCK {
			return nil
		}
		if st.Mode&syscall.S_IFMT != syscall.S_IFDIR && st.Nlink > 1 {
			k := [2]uint64{uint64(st.Dev), st.Ino}
			groups[k] = append(groups[k], p)
		}
		s, err := describe(filepath.Join(dir, p), st)
		state[p] = s
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, names := range groups {
		if len(names) > 1 {
			slices.Sort(names)
			for _, n := range names {
				state[n] += fmt.Sprintf(" group=%q", names)
			}
		}
	}
	return state
}

func walkFiles(root, p string, visit func(string, *syscall.Stat_t) error) error {
	var st syscall.Stat_t
	if err := syscall.Lstat(root+"/"+p, &st); err != nil {
		return err
	}
	if err := visit(p, &st); err != nil || st.Mode&syscall.S_IFMT != syscall.S_IFDIR {
		return err
	}
	names, err := os.ReadDir(root + "/" + p)
	for _, n := range names {
		if err := walkFiles(root, path.Join(p, n.Name()), visit); err != nil {
			return err
		}
	}
	return err
}

func describe(p string, st *syscall.Stat_t) (string, error) {
	s := fmt.Sprintf("%o %d:%d %d.%09d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		b, err := os.ReadFile(p)
		if err != nil {
			return "", err
		}
		s += fmt.Sprintf(" %d %x", len(b), sha256.Sum256(b))
	case syscall.S_IFLNK:
		target, err := os.Readlink(p)
		if err != nil {
			return "", err
		}
		s += fmt.Sprintf(" -> %q", target)
	case syscall.S_IFCHR, syscall.S_IFBLK:
		s += fmt.Sprintf(" rdev=%x", st.Rdev)
	}
	x, err := allXattrs(p)
	return s + x, err
}

func allXattrs(p string) (string, error) {
	dir, err := sys.OpenDir(filepath.Dir(p))
	if err != nil {
		return "", err
	}
	defer dir.Close()
	names, err := dir.Listxattr(filepath.Base(p))
	slices.Sort(names)
	s := ""
	for _, n := range names {
		v, err := dir.Getxattr(filepath.Base(p), n)
		if err != nil {
			return "", err
		}
		if !strings.HasPrefix(n, "trusted.SGI_ACL_") { // XFS's second name of ACLs
			s += fmt.Sprintf(" %q=%q", n, v)
		}
	}
	return s, err
}

// stateDiff prints how two trees differ; "" if they do not.
func stateDiff(got, want map[string]string) string {
	var b strings.Builder
	all := maps.Clone(got)
	maps.Copy(all, want)
	for _, p := range slices.SortedFunc(maps.Keys(all), ComparePaths) {
		if got[p] != want[p] {
			fmt.Fprintf(&b, "%q:\n  got  %s\n  want %s\n", p, got[p], want[p])
		}
	}
	return b.String()
}

// plainApply unpacks a layer with archive/tar and os calls, as the image spec
// says and in no clever way: a second opinion on both WriteTar and Apply.
func plainApply(dir string, r io.Reader) error {
	p := plainUnpacker{dir: dir, times: map[string]time.Time{}}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if err == io.EOF {
			return p.restore()
		}
		if err == nil {
			err = p.entry(h, tr)
		}
		if err != nil {
			return err
		}
	}
}

type plainUnpacker struct {
	dir   string
	times map[string]time.Time // of directories, set last
}

func (p *plainUnpacker) restore() error {
	var errs []error
	for d, at := range p.times {
		err := sysUtimes(d, at)
		if !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

func sysUtimes(p string, at time.Time) error {
	d, err := sys.OpenDir(filepath.Dir(p))
	if err != nil {
		return err
	}
	defer d.Close()
	ts := sys.Time{Sec: at.Unix(), Nsec: uint32(at.Nanosecond())}
	return d.Utimes(filepath.Base(p), ts, ts)
}

// keep notes a directory's mtime before its first change.
func (p *plainUnpacker) keep(d string) error {
	if _, ok := p.times[d]; ok {
		return nil
	}
	st, err := os.Lstat(d)
	if err != nil {
		return err
	}
	p.times[d] = st.ModTime()
	return nil
}

func (p *plainUnpacker) entry(h *tar.Header, r io.Reader) error {
	name := p.dir + "/" + strings.TrimSuffix(h.Name, "/")
	if err := p.keep(filepath.Dir(name)); err != nil && name != p.dir+"/." {
		return err
	}
	base := filepath.Base(name)
	if victim, ok := strings.CutPrefix(base, ".wh."); ok {
		return os.RemoveAll(filepath.Dir(name) + "/" + victim)
	}
	if st, err := os.Lstat(name); err == nil && !(st.IsDir() && h.Typeflag == tar.TypeDir) {
		if err := os.RemoveAll(name); err != nil {
			return err
		}
		for d := range p.times {
			if d == name || strings.HasPrefix(d, name+"/") {
				delete(p.times, d)
			}
		}
	}
	if h.Typeflag == tar.TypeLink {
		return os.Link(p.dir+"/"+h.Linkname, name)
	}
	if err := p.make(name, h, r); err != nil {
		return err
	}
	return p.meta(name, h)
}

func (p *plainUnpacker) make(name string, h *tar.Header, r io.Reader) error {
	dev := int(h.Devmajor<<8 | h.Devminor&0xff | (h.Devminor&^0xff)<<12)
	switch h.Typeflag {
	case tar.TypeDir:
		if err := os.Mkdir(name, 0o700); !errors.Is(err, os.ErrExist) {
			return err
		}
		return nil
	case tar.TypeSymlink:
		return os.Symlink(h.Linkname, name)
	case tar.TypeFifo:
		return syscall.Mknod(name, syscall.S_IFIFO, 0)
	case tar.TypeChar:
		return syscall.Mknod(name, syscall.S_IFCHR, dev)
	case tar.TypeBlock:
		return syscall.Mknod(name, syscall.S_IFBLK, dev)
	}
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

func (p *plainUnpacker) meta(name string, h *tar.Header) error {
	d, err := sys.OpenDir(filepath.Dir(name))
	if err != nil {
		return err
	}
	defer d.Close()
	base := filepath.Base(name)
	if err := d.Chown(base, uint32(h.Uid), uint32(h.Gid)); err != nil {
		return err
	}
	if h.Typeflag != tar.TypeSymlink {
		if err := d.ChmodAt(base, uint32(h.Mode)); err != nil {
			return err
		}
	}
	old, err := readXattrs(d, base)
	if err != nil {
		return err
	}
	for n := range old {
		if err := d.Removexattr(base, n); err != nil {
			return err
		}
	}
	for k, v := range h.PAXRecords {
		if n, v, err := paxXattr(k, v, h.PAXRecords); err != nil || n != "" {
			if err := errors.Join(err, d.Setxattr(base, n, v)); err != nil {
				return err
			}
		}
	}
	p.times[name] = h.ModTime
	if h.Typeflag != tar.TypeDir {
		delete(p.times, name)
		return sysUtimes(name, h.ModTime)
	}
	return nil
}
