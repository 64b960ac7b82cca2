package layer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"math"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/layerctl/layerctl/internal/sys"
)

// ReadOptions say how an entry is read.
type ReadOptions struct {
	// OverrideStat reads owner, mode and type from the xattr
	// user.containers.override_stat where it is, and hides it.
	OverrideStat bool
}

// ReadEntry reads the metadata and xattrs of one name of a directory; name ""
// is the directory itself. Path and Hardlink are left empty. A name that is not
// there wraps syscall.ENOENT.
func ReadEntry(dir *sys.Fd, name string) (Entry, error) {
	return ReadEntryOptions(dir, name, ReadOptions{})
}

// ReadEntryOptions is ReadEntry with options.
func ReadEntryOptions(dir *sys.Fd, name string, o ReadOptions) (Entry, error) {
	st, err := dir.Stat(name)
	if err != nil {
		return Entry{}, err
	}
	return entryOf(dir, name, &st, o)
}

// entryOf is the entry of a name that st describes.
func entryOf(dir *sys.Fd, name string, st *sys.Stat, o ReadOptions) (Entry, error) {
	e := statEntry(st)
	if e.Type == TypeSymlink {
		target, err := dir.Readlink(name)
		if err != nil {
			return e, err
		}
		e.Linkname = target
	}
	attrs, err := readXattrs(dir, name)
	if err != nil {
		return e, err
	}
	e.Xattrs = attrs
	if o.OverrideStat {
		return e, applyOverride(&e)
	}
	return e, nil
}

func statEntry(st *sys.Stat) Entry {
	e := Entry{
		Type: FileType(st.Type()), Mode: st.Mode & 0o7777, UID: st.UID, GID: st.GID,
		ModTime: Timespec{st.Mtime.Sec, st.Mtime.Nsec},
	}
	switch e.Type {
	case TypeReg:
		e.Size = st.Size
	case TypeChar, TypeBlock:
		e.Major, e.Minor = st.RdevMajor, st.RdevMinor
	}
	return e
}

// keepXattr says whether a layer carries an xattr. Left out are overlayfs's own
// (they describe the storage and not the tree), btrfs.* (inode properties of one
// file system, as the flags of chattr are) and trusted.SGI_ACL_* (what XFS calls
// the ACLs, beside the names that every file system has for them:
// fs/xfs/xfs_xattr.c, 6.18).
func keepXattr(name string) bool {
	return !strings.HasPrefix(name, "trusted.overlay.") && !strings.HasPrefix(name, "user.overlay.") &&
		!strings.HasPrefix(name, "btrfs.") && !strings.HasPrefix(name, "trusted.SGI_ACL_")
}

// readXattrs reads the xattrs that a layer carries; nil when there are none. One
// that goes while it is read was not there.
func readXattrs(dir *sys.Fd, name string) (map[string]string, error) {
	names, err := dir.Listxattr(name)
	if err != nil {
		return nil, err
	}
	var attrs map[string]string
	for _, n := range names {
		if !keepXattr(n) {
			continue
		}
		v, err := dir.Getxattr(name, n)
		if errors.Is(err, syscall.ENODATA) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if attrs == nil {
			attrs = make(map[string]string, len(names))
		}
		attrs[n] = v
	}
	return attrs, nil
}

// overrideXattr keeps the owner, mode and type that an unprivileged process
// could not set: "UID:GID:MODE" or "UID:GID:MODE:TYPE", MODE in octal, TYPE one
// of file, dir, symlink, pipe, socket, block-MAJOR-MINOR, char-MAJOR-MINOR, as
// fuse-overlayfs and containers/storage write it.
//
// A MODE of six digits, which all of them read, says that the file itself got
// HiddenMode of it and the process's own ids. What the file has else was set
// later, by somebody who sees the file as it is, and counts: a chmod or chown of
// such a file is a change like any other. With fewer digits the xattr counts.
const overrideXattr = "user.containers.override_stat"

const overrideDigits = 6

// FormatOverride is the value of user.containers.override_stat for a file of
// this owner and mode that is given HiddenMode(mode, dir) and the process's own
// ids; typ is "file" or "dir", or what a regular file stands for.
func FormatOverride(uid, gid, mode uint32, typ string) string {
	return fmt.Sprintf("%d:%d:%0*o:%s", uid, gid, overrideDigits, mode, typ)
}

// HiddenMode is the mode that a file gets whose real one is in the xattr: its
// owner can work with it, and no bit gives anybody else that owner's rights.
func HiddenMode(mode uint32, dir bool) uint32 {
	if dir {
		return mode&0o777 | 0o700
	}
	return mode&0o777 | 0o600
}

// stored is what the xattr says of an id, unless the file's own was changed
// since: real is that, own what files of this process have.
func stored(xattr uint64, real uint32, own int) uint32 {
	if real == uint32(own) {
		return uint32(xattr)
	}
	return real
}

// applyOverride puts the stored owner, mode and type into e and hides the xattr.
func applyOverride(e *Entry) error {
	v, ok := e.Xattrs[overrideXattr]
	if !ok {
		return nil
	}
	if delete(e.Xattrs, overrideXattr); len(e.Xattrs) == 0 {
		e.Xattrs = nil
	}
	f := strings.SplitN(strings.TrimRight(v, "\x00"), ":", 4)
	bad := fmt.Errorf("xattr %s: %q: %w", overrideXattr, v, errdefs.ErrInvalidArgument)
	if len(f) < 3 {
		return bad
	}
	uid, err1 := strconv.ParseUint(f[0], 10, 32)
	gid, err2 := strconv.ParseUint(f[1], 10, 32)
	mode, err3 := strconv.ParseUint(f[2], 8, 32)
	if errors.Join(err1, err2, err3) != nil {
		return bad
	}
	mode &= 0o7777
	if len(f[2]) == overrideDigits {
		uid, gid = uint64(stored(uid, e.UID, os.Geteuid())), uint64(stored(gid, e.GID, os.Getegid()))
		if e.Mode != HiddenMode(uint32(mode), e.Type == TypeDir) {
			mode = uint64(e.Mode)
		}
	}
	e.UID, e.GID, e.Mode = uint32(uid), uint32(gid), uint32(mode)
	if len(f) == 4 && !overrideType(e, f[3]) {
		return bad
	}
	return nil
}

var overrideTypes = map[string]FileType{
	"file": TypeReg, "dir": TypeDir, "symlink": TypeSymlink, "pipe": TypeFifo, "socket": TypeSocket,
	"block": TypeBlock, "char": TypeChar,
}

// overrideType sets e's type from the last field of the xattr; false if it
// cannot be read.
func overrideType(e *Entry, s string) bool {
	name, device, isDevice := strings.Cut(s, "-")
	t, ok := overrideTypes[name]
	if !ok || isDevice != (t == TypeBlock || t == TypeChar) {
		return false
	}
	if t == e.Type {
		return true
	}
	if e.Type != TypeReg || t == TypeDir || t == TypeSymlink { // a regular file stands for a node
		return false
	}
	e.Type, e.Size = t, 0
	if isDevice {
		major, minor, _ := strings.Cut(device, "-")
		ma, err1 := strconv.ParseUint(major, 10, 32)
		mi, err2 := strconv.ParseUint(minor, 10, 32)
		e.Major, e.Minor = uint32(ma), uint32(mi)
		return err1 == nil && err2 == nil
	}
	return true
}

// join is the path of name in the directory path dir.
func join(dir, name string) string {
	if dir == "." || dir == "" {
		return name
	}
	return dir + "/" + name
}

// inode tells files of one tree apart.
type inode struct{ dev, ino uint64 }

func inodeOf(st *sys.Stat) inode { return inode{st.Dev, st.Ino} }

// linkable reports whether a file may have further names.
func linkable(st *sys.Stat) bool { return st.Nlink > 1 && !st.IsDir() }

// chain is the directory that a depth-first walk stands in, with its ancestors.
// Few of them are open at a time, so that any depth works; those above are
// opened again from the root when the walk comes back, always without following
// a symlink.
type chain struct {
	root  *sys.Fd
	names []string
	fds   []*sys.Fd // parallel to names; nil where closed
}

// openDirs is how many ancestors of a walk stay open.
const openDirs = 32

// newChain opens dir, which the caller trusts.
func newChain(dir string) (*chain, error) {
	fd, err := sys.OpenDir(dir)
	if err != nil {
		return nil, err
	}
	return &chain{root: fd}, nil
}

func (c *chain) close() {
	if c == nil {
		return
	}
	for _, fd := range c.fds {
		fd.Close()
	}
	c.root.Close()
}

// enter goes into a directory.
func (c *chain) enter(name string) error {
	in, err := c.fd()
	if err != nil {
		return err
	}
	fd, err := in.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	if n := len(c.fds) - openDirs; n >= 0 {
		c.fds[n].Close()
		c.fds[n] = nil
	}
	c.names, c.fds = append(c.names, name), append(c.fds, fd)
	return nil
}

// leave goes back to the parent.
func (c *chain) leave() {
	n := len(c.fds) - 1
	c.fds[n].Close()
	c.names, c.fds = c.names[:n], c.fds[:n]
}

// fd is the open directory that the walk stands in, valid until enter or leave.
func (c *chain) fd() (*sys.Fd, error) {
	n := len(c.fds) - 1
	if n < 0 {
		return c.root, nil
	}
	if c.fds[n] == nil {
		fd, err := openBelow(c.root, c.names)
		if errors.Is(err, syscall.ENOENT) { // not to be taken for a name that went: a whole subtree would be
			return nil, fmt.Errorf("%s moved during the walk: %w", strings.Join(c.names, "/"), errdefs.ErrAborted)
		}
		if err != nil {
			return nil, err
		}
		c.fds[n] = fd
	}
	return c.fds[n], nil
}

// openBelow opens the directory that names lead to, in steps of less than
// PATH_MAX, never through a symlink.
func openBelow(root *sys.Fd, names []string) (*sys.Fd, error) {
	at := root
	for len(names) > 0 {
		n := min(len(names), 15) // 15 * 256 < 4096
		next, err := at.Openat2(strings.Join(names[:n], "/"), sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
		if at != root {
			at.Close()
		}
		if err != nil {
			return nil, err
		}
		at, names = next, names[n:]
	}
	return at, nil
}

// statBelow describes a path below root, never through a symlink.
func statBelow(root *sys.Fd, p string) (sys.Stat, error) {
	dir, err := openPath(root, path.Dir(p))
	if err != nil {
		return sys.Stat{}, err
	}
	defer dir.Close()
	return dir.Stat(path.Base(p))
}

// nameList is the names of a directory, which may have millions, in a few bytes
// more than they have themselves.
type nameList struct {
	text []byte   // each with a NUL behind it
	at   []uint32 // where in text each begins, in the names' order
}

// maxNameText is what offsets of nameList reach.
const maxNameText = math.MaxUint32

// readNames reads the names of a directory, in order.
func readNames(fd *sys.Fd) (*nameList, error) {
	l := &nameList{}
	err := fd.EachDirents(func(some []sys.Dirent) error {
		for i := range some {
			if len(l.text) > maxNameText-len(some[i].Name)-1 {
				return fmt.Errorf("a directory with more than 4 GiB of names: %w", errdefs.ErrNotImplemented)
			}
			l.at = append(l.at, uint32(len(l.text)))
			l.text = append(append(l.text, some[i].Name...), 0)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	slices.SortFunc(l.at, func(a, b uint32) int { return bytes.Compare(l.bytes(a), l.bytes(b)) })
	return l, nil
}

func (l *nameList) len() int { return len(l.at) }

func (l *nameList) bytes(at uint32) []byte {
	t := l.text[at:]
	return t[:bytes.IndexByte(t, 0)]
}

// name returns the i-th name.
func (l *nameList) name(i int) string { return string(l.bytes(l.at[i])) }

// Walk yields every entry of a tree in path order, the root first, with its
// hard-link groups resolved: the first name that the walk meets has the
// metadata, the others have Hardlink. dir is trusted; below it nothing is
// followed. An error ends the sequence.
func Walk(ctx context.Context, dir string) iter.Seq2[Entry, error] {
	return WalkOptions(ctx, dir, ReadOptions{})
}

// WalkOptions is Walk with options.
func WalkOptions(ctx context.Context, dir string, o ReadOptions) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		c, err := newChain(dir)
		if err != nil {
			yield(Entry{}, fmt.Errorf("layer: walk: %w", err))
			return
		}
		defer c.close()
		w := walker{ctx: ctx, chain: c, o: o, heads: map[inode]string{}, yield: yield}
		if err := w.root(); err != nil && err != errStop {
			yield(Entry{}, fmt.Errorf("layer: walk %s: %w", dir, err))
		}
	}
}

// errStop ends a walk whose consumer has enough.
var errStop = errors.New("stop")

type walker struct {
	ctx   context.Context
	chain *chain
	o     ReadOptions
	heads map[inode]string // first names of the files met that have several
	yield func(Entry, error) bool
}

func (w *walker) root() error {
	e, err := ReadEntryOptions(w.chain.root, "", w.o)
	if err != nil {
		return err
	}
	e.Path = "."
	if !w.yield(e, nil) {
		return errStop
	}
	return w.dir(".")
}

func (w *walker) dir(path string) error {
	if err := w.ctx.Err(); err != nil {
		return err
	}
	fd, err := w.chain.fd()
	if err != nil {
		return err
	}
	names, err := readNames(fd)
	if err != nil {
		return err
	}
	for i := range names.len() {
		name := names.name(i)
		if err := w.name(join(path, name), name); err != nil && !errors.Is(err, syscall.ENOENT) {
			return err // a name that went since the directory was read was not there
		}
	}
	return nil
}

func (w *walker) name(path, name string) error {
	e, err := w.read(path, name)
	if err != nil {
		return err
	}
	if !w.yield(e, nil) {
		return errStop
	}
	if !e.IsDir() {
		return nil
	}
	if err := w.chain.enter(name); err != nil {
		return err
	}
	defer w.chain.leave()
	return w.dir(path)
}

func (w *walker) read(path, name string) (Entry, error) {
	fd, err := w.chain.fd()
	if err != nil {
		return Entry{}, err
	}
	st, err := fd.Stat(name)
	if err != nil {
		return Entry{}, err
	}
	e, err := entryOf(fd, name, &st, w.o)
	if err != nil {
		return e, err
	}
	e.Path = path
	if linkable(&st) {
		if head, ok := w.heads[inodeOf(&st)]; ok {
			e.Hardlink = head
		} else {
			w.heads[inodeOf(&st)] = path
		}
	}
	return e, nil
}
