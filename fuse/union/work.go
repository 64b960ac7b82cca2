package union

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"

	"github.com/containerd/errdefs"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/mount"
)

// upper is the writable layer with its workdir, and the ways to change it that
// survive a crash. It knows no nodes: callers say where by descriptor and name,
// and hold the locks that keep others away from there.
//
// On disk, below workdir, as the kernel's overlayfs has it: work, where things are
// built, and what is left in it belongs to a server that died; index, whose
// entries stay (see index.go), and those that begin with '#' are like work's;
// work/incompat/volatile/dirty, which says that the upper may not have reached the
// disk and refuses the next mount until somebody removes it.
type upper struct {
	stored        string  // the xattr that keeps owner and mode; "": the files themselves do
	root, workdir *sys.Fd // as configured
	work          *sys.Fd // workdir/work: what is built; nil: the upper is only shown
	index         *sys.Fd // workdir/index; nil without Config.Index
	xattrs        *xattrNames
	can           abilities
	uuid          [16]byte
	hasUUID       bool
	exportAll     bool // Config.NFSExport: everything is indexed
	volatile      bool
	step          func(string) error // never nil
	log           func(format string, args ...any)

	release func() // the claims
	temp    atomic.Uint64
	refused refusals
	shared  sharedWhiteout
}

// The names below workdir.
const (
	workName     = "work"
	indexName    = "index"
	incompatName = "incompat"
)

// openUpper claims upper and work of c, empties work and prepares it. ctx bounds
// the wait for a server that is just going away. With c.ReadOnly it claims and
// writes nothing.
func openUpper(ctx context.Context, c *Config) (*upper, error) {
	u := &upper{step: c.Step, log: c.Log, volatile: c.Volatile, exportAll: c.NFSExport, release: func() {}}
	if u.step == nil {
		u.step = func(string) error { return nil }
	}
	if u.log == nil {
		u.log = func(string, ...any) {}
	}
	err := u.open(ctx, c)
	if err != nil {
		u.close()
		return nil, fmt.Errorf("upper %s: %w", c.Upper, err)
	}
	return u, nil
}

func (u *upper) open(ctx context.Context, c *Config) (err error) {
	if c.ReadOnly {
		u.root, err = openLower(c.Upper)
	} else if c.Work == "" {
		return fmt.Errorf("an upper needs a workdir: %w: %w", errdefs.ErrInvalidArgument, syscall.EINVAL)
	} else {
		u.root, u.workdir, err = openUpperDirs(c)
	}
	if err != nil {
		return err
	}
	if u.uuid, err = u.root.FSUUID(); err == nil {
		u.hasUUID = true
	} else if !errors.Is(err, syscall.ENOTTY) && !errors.Is(err, syscall.EOPNOTSUPP) {
		return err
	}
	if c.ReadOnly {
		u.xattrs = c.Xattrs.forReading()
		return nil
	}
	if err := u.fit(c); err != nil {
		return err
	}
	release, err := mount.Claim(ctx, c.Upper, c.Work)
	if err != nil {
		return err
	}
	u.release = release
	return u.prepare(c)
}

// fit checks that upper and workdir are of one mount and neither is in the other.
func (u *upper) fit(c *Config) error {
	a, err := u.root.Stat("")
	if err != nil {
		return err
	}
	b, err := u.workdir.Stat("")
	if err != nil {
		return err
	}
	if a.Dev != b.Dev || a.MountID != b.MountID {
		return fmt.Errorf("workdir %s is not on the same mount: %w: %w", c.Work, errdefs.ErrInvalidArgument, syscall.EINVAL)
	}
	for _, pair := range [][2]*sys.Fd{{u.root, u.workdir}, {u.workdir, u.root}} {
		in, err := inside(pair[0], pair[1])
		if err != nil {
			return err
		}
		if in {
			return fmt.Errorf("workdir %s is not a separate tree: %w: %w", c.Work, errdefs.ErrInvalidArgument, syscall.EINVAL)
		}
	}
	return nil
}

// inside tells whether a directory is another one or is in it.
func inside(dir, other *sys.Fd) (bool, error) {
	want, err := other.Stat("")
	if err != nil {
		return false, err
	}
	at, err := dir.Dup()
	if err != nil {
		return false, err
	}
	for {
		st, err := at.Stat("")
		if err != nil || st.Dev == want.Dev && st.Ino == want.Ino {
			at.Close()
			return err == nil, err
		}
		up, err := at.Openat("..", sys.O_PATH|sys.O_DIRECTORY, 0)
		at.Close()
		if errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.ENOENT) {
			return false, nil // above what this process may see, or the place of a mount that was removed
		}
		if err != nil {
			return false, err
		}
		if above, err := up.Stat(""); err != nil || above.Ino == st.Ino && above.Dev == st.Dev && above.MountID == st.MountID {
			up.Close()
			return false, err
		}
		at = up
	}
}

// prepare makes workdir what the kernel makes of it at a mount.
func (u *upper) prepare(c *Config) (err error) {
	if err := u.refuseIncompat(c.Work); err != nil {
		return err
	}
	if err := removeTree(u.workdir.Int(), workName); err != nil && err != syscall.ENOENT {
		return fmt.Errorf("emptying workdir %s: %w", c.Work, err)
	}
	if u.work, err = u.makeWork(workName); err != nil {
		return err
	}
	u.probe()
	if u.xattrs, err = c.Xattrs.forWriting(&u.can); err != nil {
		return err
	}
	u.can.chooseWhiteouts(u.xattrs)
	if c.Index {
		if u.index, err = u.makeWork(indexName); err != nil {
			return err
		}
	}
	if !c.Volatile {
		return nil
	}
	return u.markVolatile()
}

// refuseIncompat fails where an earlier mount left word that the upper may only be
// mounted by who knows what it did.
func (u *upper) refuseIncompat(workdir string) error {
	dir, err := u.workdir.Openat(workName, sys.O_PATH|sys.O_DIRECTORY, 0)
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) {
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	in, err := openHidden(dir.Int(), incompatName)
	if err == syscall.ENOENT || err == syscall.ENOTDIR {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s/%s: %w", dir.Name(), incompatName, err)
	}
	f := sys.NewFd(in, filepath.Join(workdir, workName, incompatName))
	defer f.Close()
	names, err := f.ReadDir()
	if err != nil || len(names) == 0 {
		return err
	}
	what := names[0].Name
	return fmt.Errorf("was mounted with %q before and may not be whole: remove it, or %s/%s if you know better: %w: %w",
		what, f.Name(), what, errdefs.ErrFailedPrecondition, syscall.EINVAL)
}

// openHidden opens a directory below dir for reading, one without permissions for
// its owner too.
func openHidden(dir int, name string) (int, error) {
	n, err := sys.OpenBare(dir, name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
	if err != syscall.EACCES {
		return n, err
	}
	if err := sys.ChmodBare(dir, name, 0o700); err != nil {
		return -1, err
	}
	return sys.OpenBare(dir, name, sys.O_RDONLY|sys.O_DIRECTORY, 0)
}

// makeWork opens a directory below workdir that nobody else gets into, made if it
// is not there: without permissions, and without ACLs that what is built in it
// would inherit.
func (u *upper) makeWork(name string) (*sys.Fd, error) {
	dir := u.workdir.Int()
	if err := sys.MkdirBare(dir, name, 0); err != nil && err != syscall.EEXIST {
		return nil, fmt.Errorf("mkdir %s/%s: %w", u.workdir.Name(), name, err)
	}
	for _, acl := range []string{xattrACLDefault, xattrACLAccess} {
		err := sys.RemovexattrBare(dir, name, acl)
		if err != nil && err != syscall.ENODATA && err != syscall.EOPNOTSUPP {
			return nil, fmt.Errorf("%s/%s: removing %s: %w", u.workdir.Name(), name, acl, err)
		}
	}
	if err := sys.ChmodBare(dir, name, 0); err != nil {
		return nil, fmt.Errorf("chmod %s/%s: %w", u.workdir.Name(), name, err)
	}
	n, err := openHidden(dir, name)
	if err != nil {
		return nil, fmt.Errorf("%s/%s: %w", u.workdir.Name(), name, err)
	}
	return sys.NewFd(n, u.workdir.Name()+"/"+name), nil
}

// markVolatile makes work/incompat/volatile/dirty.
func (u *upper) markVolatile() error {
	at, err := u.work.Dup()
	if err != nil {
		return err
	}
	for _, name := range []string{incompatName, "volatile"} {
		err := at.Mkdir(name, 0o700)
		if errors.Is(err, syscall.EEXIST) {
			err = nil
		}
		var next *sys.Fd
		if err == nil {
			next, err = at.Openat(name, sys.O_PATH|sys.O_DIRECTORY, 0)
		}
		at.Close()
		if err != nil {
			return err
		}
		at = next
	}
	defer at.Close()
	f, err := at.Openat("dirty", sys.O_WRONLY|sys.O_CREAT, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}

// close gives up the claims.
func (u *upper) close() error {
	for _, f := range []*sys.Fd{u.index, u.work, u.workdir, u.root} {
		f.Close()
	}
	u.release()
	return nil
}

// tempName is a new name for something in work: what the kernel's look like.
func (u *upper) tempName() string {
	return "#" + strconv.FormatUint(u.temp.Add(1), 16)
}

// discard removes what is at temp in work. It is no part of the tree, so an error
// is only logged; the next Open tries again.
func (u *upper) discard(temp string) {
	if err := removeTree(u.work.Int(), temp); err != nil && err != syscall.ENOENT {
		u.log("%s/%s cannot be removed: %v", u.work.Name(), temp, err)
	}
}

// removeTree removes name below dir with all that is in it. It follows no symlink
// and enters no other mount.
func removeTree(dir int, name string) error {
	err := sys.UnlinkBare(dir, name, 0)
	if err != syscall.EISDIR && err != syscall.EPERM { // EPERM is POSIX's answer for a directory
		return err
	}
	if e := sys.UnlinkBare(dir, name, sys.AT_REMOVEDIR); e == nil || e == syscall.ENOENT {
		return e
	} else if e == syscall.ENOTDIR {
		return err
	} else if e != syscall.ENOTEMPTY && e != syscall.EEXIST && e != syscall.EACCES {
		return e
	}
	if err := emptyTree(dir, name); err != nil {
		return err
	}
	return sys.UnlinkBare(dir, name, sys.AT_REMOVEDIR)
}

// emptyTree removes what is in the directory name below dir.
func emptyTree(dir int, name string) error {
	var above, st sys.Stat
	if err := sys.StatBare(dir, "", &above); err != nil {
		return err
	}
	n, err := openHidden(dir, name)
	if err != nil {
		return err
	}
	f := sys.NewFd(n, name)
	defer f.Close()
	if err := sys.StatBare(n, "", &st); err != nil {
		return err
	}
	if st.MountID != above.MountID {
		return syscall.EBUSY
	}
	names, err := f.ReadDir()
	if err != nil {
		return err
	}
	for _, e := range names {
		if err := removeTree(n, e.Name); err != nil && err != syscall.ENOENT {
			return err
		}
	}
	return nil
}

// forWriting chooses the namespace of overlay xattrs in an upper.
func (m XattrMode) forWriting(can *abilities) (*xattrNames, error) {
	switch {
	case m == XattrUser, m == XattrAuto && can.trusted != kprobe.Yes:
		return userNames, nil
	case m == XattrTrusted && can.trusted == kprobe.No:
		return nil, fmt.Errorf("trusted.overlay.* xattrs cannot be set here: %w: %w", errdefs.ErrNotImplemented, syscall.EPERM)
	}
	return trustedNames, nil
}

// forReading chooses the namespace where nothing is written.
func (m XattrMode) forReading() *xattrNames {
	if m == XattrUser || m == XattrAuto && !sys.TrustedXattrs() {
		return userNames
	}
	return trustedNames
}
