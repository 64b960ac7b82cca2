package union

import (
	"github.com/layerctl/layerctl/internal/sys"
)

// Caller is who asks: what new files belong to, and whose umask applies where
// no default ACL does. Permission checks are the kernel's (default_permissions).
type Caller struct {
	UID, GID uint32 // as they are shown; see Config.IDMap
	PID      uint32 // 0: unknown
	Umask    uint32
}

// Attr is what stat(2) shows of a node.
type Attr struct {
	Ino                 uint64
	Size                int64
	Blocks              int64 // of 512 bytes
	Mode                uint32
	Nlink               uint32
	UID, GID            uint32
	RdevMajor           uint32
	RdevMinor           uint32
	Blksize             uint32
	Atime, Mtime, Ctime sys.Time
	Btime               sys.Time // zero: not known
	Flags               uint64   // STATX_ATTR_*: immutable, append, ...
}

// Entry is a name that was found or made. The caller owes one Forget for it.
type Entry struct {
	Node *Node
	Attr Attr
}

// SetAttr is what Setattr changes; Valid says which fields. Times with Nsec
// UTIME_NOW are the present.
type SetAttr struct {
	Valid        SetAttrMask
	Mode         uint32
	UID, GID     uint32
	Size         int64
	Atime, Mtime sys.Time
	Ctime        sys.Time
	// KillPriv drops setuid, setgid and capabilities as a write by somebody
	// without CAP_FSETID does (FATTR_KILL_SUIDGID).
	KillPriv bool
}

// SetAttrMask says which fields of a SetAttr count.
type SetAttrMask uint32

// The fields of SetAttr.
const (
	SetMode SetAttrMask = 1 << iota
	SetUID
	SetGID
	SetSize
	SetAtime
	SetMtime
)

// DirEntry is one name of a directory as readdir(3) shows it.
type DirEntry struct {
	Name string
	Ino  uint64 // equal to Attr.Ino of the same name
	Type uint32 // S_IFMT value, never 0
	Next uint64 // where to go on after this entry; stable within one open
}

// Statfs is what statfs(2) shows: the upper's file system, or the first lower's.
type Statfs = sys.Statfs
