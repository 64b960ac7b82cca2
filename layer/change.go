package layer

import (
	"fmt"
	"io"
	"strings"
)

// FileType is the type part of st_mode (S_IFMT) as the kernel spells it.
type FileType uint32

// The file types, with the kernel's values (include/uapi/linux/stat.h).
const (
	TypeFifo    FileType = 0o010000
	TypeChar    FileType = 0o020000
	TypeDir     FileType = 0o040000
	TypeBlock   FileType = 0o060000
	TypeReg     FileType = 0o100000
	TypeSymlink FileType = 0o120000
	TypeSocket  FileType = 0o140000
)

// Timespec is a time as the file system keeps it.
type Timespec struct {
	Sec  int64
	Nsec uint32 // 0..999999999
}

// Entry is one file of a tree: all that a changeset can say of it but its
// content. Two trees are equal when their entries are (Entry.Compare) and the
// content of their regular files is.
type Entry struct {
	// Path is relative to the root, slash-separated, clean, any bytes but NUL;
	// "." is the root itself.
	Path     string
	Type     FileType
	Mode     uint32 // permission bits with setuid, setgid and sticky: 07777
	UID      uint32
	GID      uint32
	Size     int64 // apparent bytes of a regular file; 0 for every other type
	ModTime  Timespec
	Major    uint32 // of the device that a TypeChar or TypeBlock entry names
	Minor    uint32
	Linkname string // a symlink's target, as it is
	// Hardlink is set on every member of a hard-link group but its first name in
	// path order, and is that first name. Only Path and Hardlink count then; the
	// rest repeats the first's.
	Hardlink string
	// Xattrs holds every extended attribute that a layer carries, by full name
	// ("security.capability", "system.posix_acl_access"), and none of
	// trusted.overlay.* or user.overlay.*. nil when there are none.
	Xattrs map[string]string
}

// IsDir reports whether the entry is a directory.
func (e *Entry) IsDir() bool { return e.Type == TypeDir }

// Kind is what happened to a path.
type Kind byte

// The kinds, with the letters that users see.
const (
	Added    Kind = 'A'
	Modified Kind = 'C' // a file replaced by another type is Modified too
	Deleted  Kind = 'D'
)

func (k Kind) String() string { return string(rune(k)) }

// Aspect is a set of what differs in a Modified entry.
type Aspect uint16

// The aspects.
const (
	AspectType     Aspect = 1 << iota // another file type
	AspectContent                     // bytes of a regular file, its size, a symlink's target
	AspectMode                        // permission bits
	AspectOwner                       // uid or gid
	AspectTime                        // mtime
	AspectXattr                       // xattrs, ACLs and capabilities among them
	AspectRdev                        // device numbers
	AspectHardlink                    // membership of the hard-link group
)

var aspectNames = [...]string{"type", "content", "mode", "owner", "time", "xattr", "rdev", "hardlink"}

// Names returns the aspects' names, for JSON.
func (a Aspect) Names() []string {
	var names []string
	for i, n := range aspectNames {
		if a&(1<<i) != 0 {
			names = append(names, n)
		}
	}
	return names
}

func (a Aspect) String() string { return strings.Join(a.Names(), ",") }

// Change is one line of a changeset. It is valid until the iterator that
// yielded it goes on.
type Change struct {
	Kind    Kind
	Aspects Aspect // for Modified; 0 for Added and Deleted
	// Entry is the new state; for Deleted only Path is set.
	Entry Entry
	// Open opens the content of a regular file (no Hardlink) that is Added, or
	// Modified in any way: a changeset carries whole files. nil otherwise.
	Open func() (io.ReadCloser, error)
}

func (c *Change) String() string {
	if c.Kind == Modified && c.Aspects != 0 {
		return fmt.Sprintf("%c %s (%s)", c.Kind, c.Entry.Path, c.Aspects)
	}
	return fmt.Sprintf("%c %s", c.Kind, c.Entry.Path)
}

// ComparePaths orders paths as a walk meets them: by component, each compared
// by its bytes, a directory before what is in it, the root "." first. It is the
// order of every changeset, listing and layer tar.
func ComparePaths(a, b string) int { return comparePaths(a, b) }

func comparePaths[T ~string | ~[]byte](a, b T) int {
	if aRoot, bRoot := len(a) == 1 && a[0] == '.', len(b) == 1 && b[0] == '.'; aRoot || bRoot {
		switch {
		case aRoot && bRoot:
			return 0
		case aRoot:
			return -1
		}
		return 1
	}
	n := min(len(a), len(b))
	for i := range n {
		if a[i] == b[i] {
			continue
		}
		if a[i] == '/' {
			return -1
		}
		if b[i] == '/' {
			return 1
		}
		if a[i] < b[i] {
			return -1
		}
		return 1
	}
	return len(a) - len(b)
}
