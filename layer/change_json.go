package layer

import (
	"fmt"
	"maps"
	"slices"
	"time"
	"unicode/utf8"
)

// ChangeSummary is a Change as programs read it: what `diff --format json`
// prints. A field that does not apply is left out.
type ChangeSummary struct {
	Kind string `json:"kind"` // "A", "C" or "D"
	Path string `json:"path"`
	// PathBytes is the path where it is not UTF-8, and Path cannot show it.
	PathBytes []byte `json:"path_bytes,omitempty"`
	// Changed names what differs in a "C".
	Changed  []string `json:"changed,omitempty"`
	Type     string   `json:"type,omitempty"`
	Mode     string   `json:"mode,omitempty"` // octal
	UID      *uint32  `json:"uid,omitempty"`
	GID      *uint32  `json:"gid,omitempty"`
	Size     *int64   `json:"size,omitempty"` // of a regular file
	ModTime  string   `json:"mtime,omitempty"`
	Linkname string   `json:"target,omitempty"`   // of a symlink
	Hardlink string   `json:"hardlink,omitempty"` // the first name of its link group
	Device   string   `json:"device,omitempty"`   // MAJOR:MINOR
	Xattrs   []string `json:"xattrs,omitempty"`   // names
}

// Summary returns the change as programs read it.
func (c *Change) Summary() ChangeSummary {
	e := c.Entry
	s := ChangeSummary{Kind: c.Kind.String(), Path: e.Path}
	if !utf8.ValidString(e.Path) {
		s.PathBytes = []byte(e.Path)
	}
	if c.Kind == Deleted {
		return s
	}
	s.Changed, s.Type, s.Mode = c.Aspects.Names(), typeName(e.Type), fmt.Sprintf("%04o", e.Mode)
	s.UID, s.GID = &e.UID, &e.GID
	s.ModTime = time.Unix(e.ModTime.Sec, int64(e.ModTime.Nsec)).UTC().Format(time.RFC3339Nano)
	s.Linkname, s.Hardlink = e.Linkname, e.Hardlink
	switch e.Type {
	case TypeReg:
		s.Size = &e.Size
	case TypeChar, TypeBlock:
		s.Device = fmt.Sprintf("%d:%d", e.Major, e.Minor)
	}
	s.Xattrs = slices.Sorted(maps.Keys(e.Xattrs))
	return s
}

// typeName is the type in words.
func typeName(t FileType) string {
	switch t {
	case TypeReg:
		return "file"
	case TypeDir:
		return "directory"
	case TypeSymlink:
		return "symlink"
	case TypeFifo:
		return "fifo"
	case TypeChar:
		return "character device"
	case TypeBlock:
		return "block device"
	case TypeSocket:
		return "socket"
	}
	return fmt.Sprintf("type %#o", uint32(t))
}
