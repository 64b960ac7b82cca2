package uniontest

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"io"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/treegen"
)

// listing says how a tree is listed.
type listing struct {
	// since, if not zero: later times are shown as "now".
	since sys.Time
	// ctimes shows change times, too.
	ctimes bool
	// comparable leaves out what two equal trees in two places may differ in:
	// links of directories, file handles in overlay xattrs.
	comparable bool
	// noTimes leaves the times of regular files out.
	noTimes bool
}

// lister lists one tree.
type lister struct {
	listing
	lines  []string
	groups map[[2]uint64]string // the first name of an inode with several
}

// list describes a tree, a line a name, in order of names. What cannot be read
// is in the line: its errno.
func (l listing) list(root string) ([]string, error) {
	d, err := sys.OpenDir(root)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	r := &lister{listing: l, groups: map[[2]uint64]string{}}
	st, err := d.Stat("")
	if err != nil {
		return nil, err
	}
	r.lines = append(r.lines, r.describe(d, "", ".", &st))
	err = r.dir(d, "")
	return r.lines, err
}

func (r *lister) dir(d *sys.Fd, prefix string) error {
	names, err := d.ReadDir()
	if err != nil {
		r.lines = append(r.lines, fmt.Sprintf("%s* readdir: %v", prefix, treegen.Errno(err)))
		return nil
	}
	slices.SortFunc(names, func(a, b sys.Dirent) int { return strings.Compare(a.Name, b.Name) })
	for _, n := range names {
		path := prefix + n.Name
		st, err := d.Stat(n.Name)
		if err != nil {
			r.lines = append(r.lines, fmt.Sprintf("%q stat: %v", path, treegen.Errno(err)))
			continue
		}
		r.lines = append(r.lines, r.describe(d, n.Name, path, &st))
		if !st.IsDir() {
			continue
		}
		sub, err := d.Openat(n.Name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
		if err != nil {
			r.lines = append(r.lines, fmt.Sprintf("%q open: %v", path, treegen.Errno(err)))
			continue
		}
		err = r.dir(sub, path+"/")
		sub.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// typeNames are one letter a type.
var typeNames = map[uint32]string{
	sys.S_IFREG: "f", sys.S_IFDIR: "d", sys.S_IFLNK: "l", sys.S_IFIFO: "p", sys.S_IFSOCK: "s", sys.S_IFCHR: "c", sys.S_IFBLK: "b",
}

func (r *lister) describe(d *sys.Fd, name, path string, st *sys.Stat) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%q %s %04o %d:%d", path, typeNames[st.Type()], st.Mode&0o7777, st.UID, st.GID)
	links := !st.IsWhiteout() // which may be one file of many names, or not
	if !st.IsDir() && links || st.IsDir() && !r.comparable {
		fmt.Fprintf(&b, " n=%d", st.Nlink)
	}
	if !st.IsDir() { // a directory's size is about how it was made
		fmt.Fprintf(&b, " size=%d", st.Size)
	}
	if !r.noTimes || !st.IsReg() {
		b.WriteString(" m=" + r.time(st.Mtime))
	}
	if r.ctimes {
		b.WriteString(" c=" + r.time(st.Ctime))
	}
	switch st.Type() {
	case sys.S_IFCHR, sys.S_IFBLK:
		fmt.Fprintf(&b, " dev=%d:%d", st.RdevMajor, st.RdevMinor)
	case sys.S_IFLNK:
		to, err := d.Readlink(name)
		fmt.Fprintf(&b, " -> %s%s", short(to), errnoText(err))
	case sys.S_IFREG:
		b.WriteString(" " + contentOf(d, name, st.Size))
	}
	if !st.IsDir() && st.Nlink > 1 && links {
		k := [2]uint64{st.Dev, st.Ino}
		if first, ok := r.groups[k]; ok {
			fmt.Fprintf(&b, " same as %q", first)
		} else {
			r.groups[k] = path
		}
	}
	b.WriteString(r.xattrs(d, name))
	return b.String()
}

func errnoText(err error) string {
	if err == nil {
		return ""
	}
	return fmt.Sprintf(" (%v)", treegen.Errno(err))
}

func (r *lister) time(t sys.Time) string {
	if r.since != (sys.Time{}) && (t.Sec > r.since.Sec || t.Sec == r.since.Sec && t.Nsec >= r.since.Nsec) {
		return "now"
	}
	return fmt.Sprintf("%d.%09d", t.Sec, t.Nsec)
}

// handles are overlay xattrs with file handles in them.
var handles = []string{"origin", "upper"}

// identity is what the kernel writes to the root of a new upper for statfs's
// f_fsid (uuid=auto); it says nothing about the tree, and FUSE has no f_fsid.
var identity = []string{"trusted.overlay.uuid", "user.overlay.uuid"}

func (r *lister) xattrs(d *sys.Fd, name string) string {
	names, err := d.Listxattr(name)
	if err != nil {
		return " xattrs" + errnoText(err)
	}
	slices.Sort(names)
	var b strings.Builder
	for _, n := range names {
		v, err := d.Getxattr(name, n)
		if errors.Is(err, syscall.ENODATA) { // a name whose value a security module keeps to itself
			continue
		}
		if slices.Contains(identity, n) && r.comparable {
			continue
		}
		_, own, ok := strings.Cut(n, "overlay.")
		if ok && r.comparable && slices.Contains(handles, own) && strings.Count(n, ".") == 2 {
			v = "..."
		}
		fmt.Fprintf(&b, " %s=%s%s", n, short(v), errnoText(err))
	}
	return b.String()
}

// short quotes a value, a long one by its digest.
func short(v string) string {
	if len(v) > 80 {
		sum := sha256.Sum256([]byte(v))
		return fmt.Sprintf("[%d bytes, %x]", len(v), sum[:6])
	}
	return strconv.QuoteToASCII(v)
}

// contentOf is a digest of a file's bytes.
func contentOf(d *sys.Fd, name string, size int64) string {
	f, err := d.Openat(name, sys.O_RDONLY, 0)
	if err != nil {
		return "open:" + errnoText(err)
	}
	defer f.Close()
	sum, err := digest(f, size)
	return sum + errnoText(err)
}

// block is the unit in which zeros are passed over.
const block = 64 << 10

// digest takes the digest of size bytes; blocks of zeros count by their place
// alone, and holes are not read.
func digest(f *sys.Fd, size int64) (string, error) {
	h := sha256.New()
	buf := make([]byte, min(block, max(size, 1)))
	zero := make([]byte, len(buf))
	for at := int64(0); at < size; {
		if size > 16*block {
			next, err := f.SeekData(at)
			if errors.Is(err, syscall.ENXIO) {
				break
			}
			if err == nil {
				at = max(at, next/block*block)
			}
		}
		n, err := f.ReadAt(buf[:min(block, size-at)], at)
		if n > 0 && string(buf[:n]) != string(zero[:n]) {
			add(h, at, buf[:n])
		}
		if err != nil && err != io.EOF {
			return "", err
		}
		if n == 0 {
			return "short", nil
		}
		at += int64(n)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:6]), nil
}

func add(h hash.Hash, at int64, b []byte) {
	var n [8]byte
	binary.BigEndian.PutUint64(n[:], uint64(at))
	h.Write(n[:])
	h.Write(b)
}

// difference shows the lines that two listings do not share, "" if none; the
// first is marked -, the second +.
func difference(a, b []string) string {
	in := func(of []string) map[string]int {
		m := map[string]int{}
		for _, s := range of {
			m[s]++
		}
		return m
	}
	var out []string
	add := func(mark string, from []string, not map[string]int) {
		for _, s := range from {
			if not[s]--; not[s] < 0 {
				out = append(out, mark+" "+s)
			}
		}
	}
	add("-", a, in(b))
	add("+", b, in(a))
	slices.SortStableFunc(out, func(x, y string) int { return strings.Compare(firstField(x), firstField(y)) })
	const most = 40
	if len(out) > most {
		out = append(out[:most], fmt.Sprintf("... and %d more lines", len(out)-most))
	}
	return strings.Join(out, "\n")
}

func firstField(line string) string {
	f := strings.SplitN(line, " ", 3)
	if len(f) > 1 {
		return f[1]
	}
	return line
}
