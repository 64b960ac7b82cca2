package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/kprobe"
	"github.com/layerctl/layerctl/internal/sys"
)

// abilities is what upper's file system lets this process do. Unknown counts as
// no wherever there is another way.
type abilities struct {
	devices        kprobe.Answer // mknod 0/0: whiteouts
	renameWhiteout kprobe.Answer // RENAME_WHITEOUT
	exchange       kprobe.Answer // RENAME_EXCHANGE
	trusted        kprobe.Answer // trusted.* xattrs
	user           kprobe.Answer // user.* xattrs
	tmpfile        kprobe.Answer // O_TMPFILE, and a name for it
	clone          kprobe.Answer // FICLONE
	handles        kprobe.Answer // name_to_handle_at, and opening by it
	types          kprobe.Answer // d_type

	xattrs    bool // overlayfs's own can be set
	whiteouts whiteoutKind
}

// whiteoutKind is how a whiteout is written.
type whiteoutKind int

const (
	whiteoutDevice whiteoutKind = iota // a character device 0/0
	whiteoutXattr                      // an empty file with xattr whiteout, in a directory with opaque="x"
	whiteoutFile                       // a file .wh.NAME; opaque: .wh..wh..opq
)

func (a *abilities) chooseWhiteouts(x *xattrNames) {
	a.xattrs = a.user == kprobe.Yes
	if x == trustedNames {
		a.xattrs = a.trusted == kprobe.Yes
	}
	switch {
	case a.devices == kprobe.Yes:
		a.whiteouts = whiteoutDevice
	case a.xattrs:
		a.whiteouts = whiteoutXattr
	default:
		a.whiteouts = whiteoutFile
	}
}

// results are the answers with their reasons, in the kernel's words.
func (a *abilities) results() []kprobe.Result {
	return []kprobe.Result{
		{Feature: "whiteout devices", Answer: a.devices}, {Feature: "RENAME_WHITEOUT", Answer: a.renameWhiteout},
		{Feature: "RENAME_EXCHANGE", Answer: a.exchange}, {Feature: "trusted xattrs", Answer: a.trusted},
		{Feature: "user xattrs", Answer: a.user}, {Feature: "O_TMPFILE", Answer: a.tmpfile},
		{Feature: "FICLONE", Answer: a.clone}, {Feature: "file handles", Answer: a.handles}, {Feature: "d_type", Answer: a.types},
	}
}

// answer sorts what a system call said.
func answer(err error) kprobe.Answer {
	switch err {
	case nil:
		return kprobe.Yes
	case syscall.EOPNOTSUPP, syscall.ENOTTY, syscall.EINVAL, syscall.EPERM, syscall.EACCES, syscall.ENOSYS, syscall.EXDEV, syscall.EISDIR:
		return kprobe.No
	}
	return kprobe.Unknown // ENOSPC, EIO, ...: not about the feature
}

// probe finds out by trying, in work, which is empty before and after.
func (u *upper) probe() {
	w, a := u.work.Int(), &u.can
	for _, x := range []struct {
		attr string
		to   *kprobe.Answer
	}{{trustedNames.opaque, &a.trusted}, {userNames.opaque, &a.user}} {
		err := sys.SetxattrBare(w, "", x.attr, []byte("0"), 0)
		*x.to = answer(err)
		if err == nil {
			_ = sys.RemovexattrBare(w, "", x.attr)
		}
	}
	a.devices = u.probeWhiteout()
	a.renameWhiteout, a.exchange = u.probeRenames()
	a.tmpfile, a.clone = u.probeFiles()
	var h sys.FileHandle
	_, err := sys.HandleBare(w, "", &h)
	if err == nil {
		var n int
		if n, err = sys.OpenHandleBare(w, &h, sys.O_PATH); err == nil {
			sys.CloseBare(n)
		}
	}
	a.handles = answer(err)
	a.types = u.probeTypes()
}

func (u *upper) probeWhiteout() kprobe.Answer {
	name := u.tempName()
	err := sys.MknodBare(u.work.Int(), name, sys.S_IFCHR, 0, 0)
	if err != nil {
		return answer(err)
	}
	defer u.discard(name)
	var st sys.Stat
	if err := sys.StatBare(u.work.Int(), name, &st); err != nil || !st.IsWhiteout() {
		return kprobe.No
	}
	return kprobe.Yes
}

func (u *upper) probeRenames() (whiteout, exchange kprobe.Answer) {
	w, a, b := u.work.Int(), u.tempName(), u.tempName()
	for _, name := range []string{a, b} {
		if err := sys.MknodBare(w, name, sys.S_IFREG|0o600, 0, 0); err != nil {
			return kprobe.Unknown, kprobe.Unknown
		}
		defer u.discard(name)
	}
	exchange = answer(sys.RenameBare(w, a, w, b, sys.RENAME_EXCHANGE))
	if whiteout = answer(sys.RenameBare(w, a, w, b, sys.RENAME_WHITEOUT)); whiteout == kprobe.Yes {
		var st sys.Stat
		if err := sys.StatBare(w, a, &st); err != nil || !st.IsWhiteout() {
			whiteout = kprobe.No
		}
	}
	return whiteout, exchange
}

func (u *upper) probeFiles() (tmpfile, clone kprobe.Answer) {
	w, name := u.work.Int(), u.tempName()
	n, err := sys.TmpfileBare(w, sys.O_RDWR, 0o600)
	if err == nil {
		err = sys.LinkBare(n, "", w, name)
		sys.CloseBare(n)
		defer u.discard(name)
	}
	tmpfile = answer(err)
	if err != nil {
		if err := sys.MknodBare(w, name, sys.S_IFREG|0o600, 0, 0); err != nil {
			return tmpfile, kprobe.Unknown
		}
		defer u.discard(name)
	}
	return tmpfile, u.probeClone(name)
}

func (u *upper) probeClone(name string) kprobe.Answer {
	from, err := sys.OpenBare(u.work.Int(), name, sys.O_RDWR, 0)
	if err != nil {
		return kprobe.Unknown
	}
	defer sys.CloseBare(from)
	to := u.tempName()
	n, err := sys.OpenBare(u.work.Int(), to, sys.O_RDWR|sys.O_CREAT|sys.O_EXCL, 0o600)
	if err != nil {
		return kprobe.Unknown
	}
	defer u.discard(to)
	defer sys.CloseBare(n)
	return answer(sys.CloneBare(n, from))
}

// probeTypes looks whether a directory says which type its names have.
func (u *upper) probeTypes() kprobe.Answer {
	names, err := u.workdir.ReadDir()
	if err != nil {
		return kprobe.Unknown
	}
	for _, e := range names {
		if e.Name == workName {
			if e.Type == sys.S_IFDIR {
				return kprobe.Yes
			}
			return kprobe.No
		}
	}
	return kprobe.Unknown
}
