package uniontest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/treegen"
)

// side is one of the two unions of the differential test.
type side struct {
	subject *Subject
	spec    Spec
	mnt     string
	mounted Mounted
	open    map[uint32]*os.File
	list    listing
	noTimes bool // files' times may differ
	noLinks bool // directories' link counts may differ
}

func (s *side) mount(ctx context.Context) (err error) {
	s.mounted, err = s.subject.Mount(ctx, s.spec, s.mnt)
	return err
}

func (s *side) unmount() error {
	for n, f := range s.open {
		f.Close()
		delete(s.open, n)
	}
	if s.mounted == nil {
		return nil
	}
	m := s.mounted
	s.mounted = nil
	return m.Unmount()
}

// do does one operation and says what came of it: the errno, what was read, and
// how the names look that it was about.
func (s *side) do(o treegen.Op) string {
	was := s.ino(o.Path)
	out, err := s.act(o)
	var b strings.Builder
	fmt.Fprintf(&b, "%s%s", errnoName(err), out)
	now := s.ino(o.Path)
	if !slices.Contains(newInodes, o.Verb) {
		fmt.Fprintf(&b, " | %s", sameness(was, now))
	}
	if o.To != "" && o.Verb != treegen.Symlink {
		fmt.Fprintf(&b, ", moved: %v | to: %s", was != 0 && was == s.ino(o.To), s.look(o.To))
		fmt.Fprintf(&b, " | in: %s", s.look(parent(o.To)))
	}
	if o.Path != "" {
		fmt.Fprintf(&b, " | %s | in: %s", s.look(o.Path), s.look(parent(o.Path)))
	}
	return b.String()
}

// newInodes are the verbs that may put a new inode where one was: it may get the
// old one's number, as chance has it.
var newInodes = []treegen.Verb{treegen.Recreate, treegen.Replace}

func errnoName(err error) string {
	var e syscall.Errno
	switch {
	case err == nil:
		return "ok"
	case errors.As(err, &e):
		return unix.ErrnoName(e)
	}
	return err.Error()
}

func sameness(was, now uint64) string {
	switch {
	case was == now:
		return "the same inode"
	case was == 0:
		return "a new inode"
	case now == 0:
		return "gone"
	}
	return "another inode"
}

// at opens the directory that holds p; no component may be a symlink.
func (s *side) at(p string) (*sys.Fd, string, error) {
	if p == "" || p == "." {
		return nil, "", syscall.EINVAL
	}
	root, err := sys.OpenDir(s.mnt)
	if err != nil {
		return nil, "", err
	}
	defer root.Close()
	dir, name := path.Split(p)
	d, err := root.Openat2("./"+dir, sys.O_RDONLY|sys.O_DIRECTORY, 0, sys.RESOLVE_BENEATH|sys.RESOLVE_NO_SYMLINKS)
	return d, name, err
}

func (s *side) stat(p string) (st sys.Stat, err error) {
	if p == "." {
		return sys.StatPath(s.mnt)
	}
	d, name, err := s.at(p)
	if err != nil {
		return st, err
	}
	defer d.Close()
	return d.Stat(name)
}

// ino is the inode number of a path, 0 if there is none.
func (s *side) ino(p string) uint64 {
	if p == "" {
		return 0
	}
	st, err := s.stat(p)
	if err != nil {
		return 0
	}
	return st.Ino
}

// look describes a name by its attributes.
func (s *side) look(p string) string {
	st, err := s.stat(p)
	if err != nil {
		return errnoName(err)
	}
	return s.attrs(&st)
}

func (s *side) attrs(st *sys.Stat) string {
	r := &lister{listing: s.list}
	times := " m=" + r.time(st.Mtime)
	if s.noTimes && st.IsReg() {
		times = ""
	}
	links, size := fmt.Sprintf(" n=%d", st.Nlink), ""
	if !st.IsDir() {
		size = fmt.Sprintf(" size=%d", st.Size)
	} else if s.noLinks {
		links = ""
	}
	return fmt.Sprintf("%s %04o %d:%d%s%s%s", typeNames[st.Type()], st.Mode&0o7777, st.UID, st.GID, links, size, times)
}

// act does what an operation says.
func (s *side) act(o treegen.Op) (string, error) {
	switch o.Verb {
	case opOpen, opTmpfile:
		return "", s.openSlot(o)
	case opClose, opPread, opPwrite, opFtrunc, opFstat, opFchmod, opFsync, opMmap, opFalloc, opCopy, opLinkfd:
		f := s.open[o.Slot]
		if f == nil {
			return "", unix.EBADF
		}
		return s.onFile(f, o)
	}
	d, name, err := s.at(o.Path)
	if err != nil {
		if o.Path == "." && o.Verb == opReaddir {
			return s.readdir(".")
		}
		return "", err
	}
	defer d.Close()
	switch o.Verb {
	case treegen.Link, treegen.Rename, treegen.Exchange, opNoRepl:
		return "", s.two(d, name, o)
	case opReaddir:
		return s.readdir(o.Path)
	case opRead, opXattrs, opReadlink:
		return s.show(d, name, o)
	case treegen.Write, treegen.Append, treegen.Truncate:
		return "", writeName(d, name, o)
	}
	return "", changeName(d, name, o)
}

func (s *side) openSlot(o treegen.Op) error {
	d, name, err := s.at(o.Path)
	if err != nil {
		return err
	}
	defer d.Close()
	flags, mode := int(o.Mode), uint32(0o640)
	if o.Verb == opTmpfile {
		flags, mode = unix.O_TMPFILE|unix.O_RDWR, o.Mode
	} else if st, err := d.Stat(name); err == nil && !st.IsReg() { // a fifo or device would block
		return unix.ENXIO
	}
	n, err := unix.Openat(d.Int(), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, mode)
	if err != nil {
		return err
	}
	if old := s.open[o.Slot]; old != nil {
		old.Close()
	}
	s.open[o.Slot] = os.NewFile(uintptr(n), o.Path)
	return nil
}

// onFile does the operations on an open file.
func (s *side) onFile(f *os.File, o treegen.Op) (string, error) {
	n := fd(f)
	switch o.Verb {
	case opClose:
		delete(s.open, o.Slot)
		return "", f.Close()
	case opPread:
		b := make([]byte, o.Size)
		n, err := unix.Pread(n, b, o.Off)
		return " " + short(string(b[:max(n, 0)])), err
	case opPwrite:
		n, err := unix.Pwrite(n, treegen.Content(o.Seed, o.Size), o.Off)
		return fmt.Sprintf(" %d", n), err
	case opFtrunc:
		return "", unix.Ftruncate(n, o.Size)
	case opFchmod:
		return "", unix.Fchmod(n, o.Mode)
	case opFsync:
		return "", unix.Fsync(n)
	case opFalloc:
		return "", unix.Fallocate(n, o.Mode, o.Off, o.Size)
	case opMmap:
		return mmapWrite(n, o)
	case opLinkfd:
		d, name, err := s.at(o.Path)
		if err != nil {
			return "", err
		}
		defer d.Close()
		return "", unix.Linkat(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", n), d.Int(), name, unix.AT_SYMLINK_FOLLOW)
	case opCopy:
		to := s.open[o.Major]
		if to == nil {
			return "", unix.EBADF
		}
		from, at := o.Off, o.Off
		c, err := unix.CopyFileRange(n, &from, fd(to), &at, int(o.Size), 0)
		return fmt.Sprintf(" %d", c), err
	}
	return s.fstat(n)
}

func (s *side) fstat(n int) (string, error) {
	st, err := sys.StatPath(fmt.Sprintf("/proc/self/fd/%d", n))
	if err != nil {
		return "", err
	}
	return " " + s.attrs(&st), nil
}

// mmapWrite writes within the file's size through a shared mapping.
func mmapWrite(n int, o treegen.Op) (string, error) {
	var st unix.Stat_t
	if err := unix.Fstat(n, &st); err != nil {
		return "", err
	}
	if st.Size == 0 {
		return " empty", nil
	}
	m, err := unix.Mmap(n, 0, int(st.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return "", err
	}
	off := o.Off % st.Size
	copied := copy(m[off:], treegen.Content(o.Seed, o.Size))
	err = unix.Msync(m, unix.MS_SYNC)
	return fmt.Sprintf(" %d", copied), errors.Join(err, unix.Munmap(m))
}

func (s *side) two(d *sys.Fd, name string, o treegen.Op) error {
	to, toName, err := s.at(o.To)
	if err != nil {
		return err
	}
	defer to.Close()
	switch o.Verb {
	case treegen.Link:
		return d.Link(name, to, toName)
	case treegen.Exchange:
		return d.Rename(name, to, toName, unix.RENAME_EXCHANGE)
	case opNoRepl:
		return d.Rename(name, to, toName, unix.RENAME_NOREPLACE)
	}
	return d.Rename(name, to, toName, 0)
}

// untrueNumber is said of a name in a list.
const untrueNumber = " d_ino is not st_ino"

// readdir lists a directory, and checks that d_ino is st_ino and nothing is there
// twice.
func (s *side) readdir(p string) (string, error) {
	d, err := s.openDir(p)
	if err != nil {
		return "", err
	}
	defer d.Close()
	var names []string
	buf := make([]byte, 4096)
	for {
		n, err := unix.Getdents(d.Int(), buf)
		if err != nil || n == 0 {
			slices.Sort(names)
			return fmt.Sprintf(" %q", names), err
		}
		for _, e := range parseDirents(buf[:n]) {
			text := fmt.Sprintf("%s:%d", e.name, e.typ)
			if slices.Contains(names, text) {
				text += " twice"
			}
			if st, err := d.Stat(e.name); err == nil && st.Ino != e.ino && e.name != ".." {
				text += untrueNumber
			}
			names = append(names, text)
		}
	}
}

func (s *side) openDir(p string) (*sys.Fd, error) {
	if p == "." {
		return sys.OpenDir(s.mnt)
	}
	d, name, err := s.at(p)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
}

// show reads what a name holds.
func (s *side) show(d *sys.Fd, name string, o treegen.Op) (string, error) {
	switch o.Verb {
	case opReadlink:
		to, err := d.Readlink(name)
		return " " + short(to), err
	case opXattrs:
		if _, err := d.Stat(name); err != nil {
			return "", err
		}
		return (&lister{listing: s.list}).xattrs(d, name), nil
	}
	st, err := d.Stat(name)
	if err != nil || !st.IsReg() {
		return " not a file", err
	}
	return " " + contentOf(d, name, st.Size), nil
}

// writeName opens a file by name, changes its content and closes it.
func writeName(d *sys.Fd, name string, o treegen.Op) error {
	st, err := d.Stat(name)
	if err != nil {
		return err
	}
	if !st.IsReg() {
		return unix.EISDIR
	}
	f, err := d.Openat(name, sys.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	switch o.Verb {
	case treegen.Truncate:
		return f.Truncate(o.Size)
	case treegen.Append:
		o.Off = st.Size
	}
	_, err = f.WriteAt(treegen.Content(o.Seed, o.Size), o.Off)
	return err
}

// changeName does treegen's verbs, each as one system call where that can be, and
// sets no time but where that is what it does.
func changeName(d *sys.Fd, name string, o treegen.Op) error {
	switch o.Verb {
	case treegen.Create:
		f, err := d.Openat(name, sys.O_WRONLY|sys.O_CREAT|sys.O_EXCL, o.Mode)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = f.WriteAt(treegen.Content(o.Seed, o.Size), 0)
		return err
	case treegen.Replace:
		const temp = ".new"
		o.Verb = treegen.Create
		if err := changeName(d, temp, o); err != nil {
			return err
		}
		err := d.Rename(temp, d, name, 0)
		if err != nil {
			_ = d.Unlink(temp, 0)
		}
		return err
	case treegen.Mkdir:
		return d.Mkdir(name, o.Mode)
	case treegen.Symlink:
		return d.Symlink(o.To, name)
	case treegen.Mknod:
		return d.Mknod(name, o.Mode, o.Major, o.Minor)
	case treegen.Unlink:
		return d.Unlink(name, 0)
	case treegen.Rmdir:
		return d.Unlink(name, sys.AT_REMOVEDIR)
	case treegen.RmTree:
		return removeTree(d, name)
	case treegen.Recreate:
		if err := removeTree(d, name); err != nil {
			return err
		}
		return d.Mkdir(name, o.Mode)
	}
	return changeMeta(d, name, o)
}

func changeMeta(d *sys.Fd, name string, o treegen.Op) error {
	st, err := d.Stat(name)
	if err != nil {
		return err
	}
	switch o.Verb {
	case treegen.Chmod:
		if st.Type() == sys.S_IFLNK {
			return unix.ELOOP
		}
		return d.ChmodAt(name, o.Mode)
	case treegen.Chown:
		return d.Chown(name, o.UID, o.GID)
	case treegen.Utimes:
		at := sys.Time{Sec: o.Sec, Nsec: o.Nsec}
		return d.Utimes(name, at, at)
	case treegen.Setxattr:
		return d.Setxattr(name, o.Attr, o.Value)
	case treegen.Rmxattr:
		return d.Removexattr(name, o.Attr)
	}
	return unix.ENOSYS
}

// removeTree removes what it can; the first error counts.
func removeTree(d *sys.Fd, name string) error {
	st, err := d.Stat(name)
	if err != nil {
		return err
	}
	if !st.IsDir() {
		return d.Unlink(name, 0)
	}
	sub, err := d.Openat(name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer sub.Close()
	names, err := sub.ReadDir()
	if err != nil {
		return err
	}
	slices.SortFunc(names, func(a, b sys.Dirent) int { return strings.Compare(a.Name, b.Name) })
	for _, n := range names {
		if err := removeTree(sub, n.Name); err != nil {
			return err
		}
	}
	return d.Unlink(name, sys.AT_REMOVEDIR)
}
