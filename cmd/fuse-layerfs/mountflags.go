package main

import (
	"strings"

	"github.com/layerctl/layerctl/fuse/union"
	"github.com/layerctl/layerctl/internal/sys"
)

// mountFlags is what any file system takes: mount(8)'s "filesystem-independent
// options", and libfuse's.
type mountFlags struct {
	set1, set0 uintptr // MS_ flags given and denied
	allowOther bool
	fsname     string
	subtype    string
	extra      []string // labels, for the kernel as they are
}

// flagOptions are the options that stand for a flag of mount(2).
var flagOptions = map[string]struct {
	flag uintptr
	off  bool
}{
	"ro": {sys.MS_RDONLY, false}, "rw": {sys.MS_RDONLY, true},
	"suid": {sys.MS_NOSUID, true}, "nosuid": {sys.MS_NOSUID, false},
	"dev": {sys.MS_NODEV, true}, "nodev": {sys.MS_NODEV, false},
	"exec": {sys.MS_NOEXEC, true}, "noexec": {sys.MS_NOEXEC, false},
	"async": {sys.MS_SYNCHRONOUS, true}, "sync": {sys.MS_SYNCHRONOUS, false}, "dirsync": {sys.MS_DIRSYNC, false},
	"atime": {sys.MS_NOATIME, true}, "noatime": {sys.MS_NOATIME, false},
	"diratime": {sys.MS_NODIRATIME, true}, "nodiratime": {sys.MS_NODIRATIME, false},
	"relatime": {sys.MS_RELATIME, false}, "norelatime": {sys.MS_RELATIME, true},
	"strictatime": {sys.MS_STRICTATIME, false}, "nostrictatime": {sys.MS_STRICTATIME, true},
	"lazytime": {sys.MS_LAZYTIME, false}, "nolazytime": {sys.MS_LAZYTIME, true},
	"symfollow": {sys.MS_NOSYMFOLLOW, true}, "nosymfollow": {sys.MS_NOSYMFOLLOW, false},
	"silent": {sys.MS_SILENT, false}, "loud": {sys.MS_SILENT, true},
}

// labelOptions are SELinux's: what all files of a mount are labelled as.
var labelOptions = map[string]bool{"context": true, "fscontext": true, "defcontext": true, "rootcontext": true}

// ignoredOptions mean something to mount(8), fstab or libfuse, and nothing here.
var ignoredOptions = map[string]bool{
	"defaults": true, "auto": true, "noauto": true, "user": true, "nouser": true, "users": true, "owner": true, "group": true,
	"_netdev": true, "nofail": true, "iversion": true, "noiversion": true, "mand": true, "nomand": true,
	"default_permissions": true, // always
	"nonempty":            true, "big_writes": true, "allow_root": true, "kernel_cache": true, "auto_cache": true, "noforget": true,
	"splice_read": true, "splice_write": true, "splice_move": true, "no_splice_read": true, "no_splice_write": true,
	"atomic_o_trunc": true, "use_ino": true, "readdir_ino": true, "hard_remove": true, "auto_unmount": true,
	"max_read": true, "max_write": true, "max_readahead": true, "max_background": true, "congestion_threshold": true,
	"entry_timeout": true, "attr_timeout": true, "negative_timeout": true, "comment": true, "helper": true, "uhelper": true,
	"user_id": true, "group_id": true, "rootmode": true, "umask": true, "uid": true, "gid": true,
}

// set takes one option; false for one that nobody knows.
func (m *mountFlags) set(key, value string, has bool) bool {
	if f, ok := flagOptions[key]; ok && !has {
		m.set1, m.set0 = m.set1&^f.flag, m.set0&^f.flag
		if f.off {
			m.set0 |= f.flag
		} else {
			m.set1 |= f.flag
		}
		return true
	}
	switch {
	case key == "allow_other" && !has:
		m.allowOther = true
	case key == "fsname" && has:
		m.fsname = value
	case key == "subtype" && has:
		m.subtype = value
	case has && labelOptions[key]:
		m.extra = append(m.extra, key+"="+value)
	default:
		return ignoredOptions[key] || strings.HasPrefix(key, "x-") || strings.HasPrefix(key, "X-")
	}
	return true
}

func (m *mountFlags) readOnly() bool { return m.set1&sys.MS_RDONLY != 0 }

// atime is what the flags say about times of access, which FUSE leaves to its
// server.
func (m *mountFlags) atime() (when union.Atime, noDirs bool) {
	switch {
	case m.set1&sys.MS_NOATIME != 0:
		when = union.AtimeNever
	case m.set1&sys.MS_STRICTATIME != 0:
		when = union.AtimeAlways
	}
	return when, m.set1&sys.MS_NODIRATIME != 0
}

// flags is what mount(2) gets. As fuse-overlayfs: a mount by root honours setuid
// bits, and none honours devices that it is not told to.
func (m *mountFlags) flags(root bool) uintptr {
	flags := m.set1
	if m.set0&sys.MS_NODEV == 0 {
		flags |= sys.MS_NODEV
	}
	if !root && m.set0&sys.MS_NOSUID == 0 {
		flags |= sys.MS_NOSUID
	}
	return flags
}
