package drivertest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

func itoa(n int) string { return strconv.Itoa(n) }

// lister lists a tree, one line a name, all that two equal trees have in
// common. It shares no code with package layer, whose walk it helps to judge.
type lister struct {
	lines  []string
	groups map[uint64]string // first name of each inode of several names
}

// list lists the tree of dir in path order.
func list(dir string) ([]string, error) {
	d, err := sys.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	l := &lister{groups: map[uint64]string{}}
	if err := l.dir(d, "."); err != nil {
		return nil, err
	}
	return l.lines, nil
}

func (l *lister) dir(d *sys.Fd, path string) error {
	st, err := d.Stat("")
	if err != nil {
		return err
	}
	if err := l.add(d, "", path, &st); err != nil {
		return err
	}
	names, err := d.ReadDir()
	if err != nil {
		return err
	}
	slices.SortFunc(names, func(a, b sys.Dirent) int { return strings.Compare(a.Name, b.Name) })
	for _, n := range names {
		if err := l.name(d, n.Name, join(path, n.Name)); err != nil {
			return err
		}
	}
	return nil
}

func join(dir, name string) string {
	if dir == "." {
		return name
	}
	return dir + "/" + name
}

func (l *lister) name(d *sys.Fd, name, path string) error {
	st, err := d.Stat(name)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return l.add(d, name, path, &st)
	}
	sub, err := d.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	return l.dir(sub, path)
}

// add writes the line of one name; name "" is d itself.
func (l *lister) add(d *sys.Fd, name, path string, st *sys.Stat) error {
	line := fmt.Sprintf("%q %06o %d:%d %d.%09d", path, st.Mode, st.UID, st.GID, st.Mtime.Sec, st.Mtime.Nsec)
	switch st.Type() {
	case sys.S_IFREG:
		sum, err := digest(d, name)
		if err != nil {
			return err
		}
		line += fmt.Sprintf(" %d %s", st.Size, sum)
	case sys.S_IFLNK:
		target, err := d.Readlink(name)
		if err != nil {
			return err
		}
		line += fmt.Sprintf(" -> %q", target)
	case sys.S_IFCHR, sys.S_IFBLK:
		line += fmt.Sprintf(" %d:%d", st.RdevMajor, st.RdevMinor)
	}
	attrs, err := xattrs(d, name)
	if err != nil {
		return err
	}
	l.lines = append(l.lines, line+attrs+l.group(path, st))
	return nil
}

// group names the first name of a file's hard-link group.
func (l *lister) group(path string, st *sys.Stat) string {
	if st.IsDir() || st.Nlink < 2 {
		return ""
	}
	first, seen := l.groups[st.Ino]
	if !seen {
		l.groups[st.Ino] = path
		return ""
	}
	return fmt.Sprintf(" link of %q", first)
}

func xattrs(d *sys.Fd, name string) (string, error) {
	names, err := d.Listxattr(name)
	if err != nil {
		return "", err
	}
	slices.Sort(names)
	var b strings.Builder
	for _, n := range names {
		if strings.HasPrefix(n, "trusted.overlay.") || strings.HasPrefix(n, "user.overlay.") || strings.HasPrefix(n, "trusted.SGI_ACL_") {
			continue // a driver's own, XFS's second names of ACLs; no layer carries them
		}
		v, err := d.Getxattr(name, n)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, " %s=%q", n, v)
	}
	return b.String(), nil
}

// digest is a short digest of a file's content.
func digest(d *sys.Fd, name string) (string, error) {
	f, err := d.Openat(name, sys.O_RDONLY, 0)
	if errors.Is(err, syscall.EACCES) {
		return "unreadable", nil
	}
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}

// difference shows the lines that only one of two sorted-alike listings has; ""
// if they are equal.
func difference(got, want []string) string {
	if slices.Equal(got, want) {
		return ""
	}
	has := func(in []string) map[string]int {
		m := map[string]int{}
		for _, l := range in {
			m[l]++
		}
		return m
	}
	inGot, inWant := has(got), has(want)
	var b strings.Builder
	show := func(mark string, lines []string, other map[string]int) {
		for _, l := range lines {
			if other[l]--; other[l] < 0 {
				fmt.Fprintf(&b, "%s %s\n", mark, l)
			}
		}
	}
	show("-", want, inGot)
	show("+", got, inWant)
	if b.Len() == 0 {
		return "the same lines in another order"
	}
	return b.String()
}
