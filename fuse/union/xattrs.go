package union

import (
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// xattrNames are overlayfs's own xattrs in one namespace.
type xattrNames struct {
	prefix  string // "trusted.overlay." or "user.overlay."
	escaped string // prefix + "overlay.": how one of an overlay inside is stored

	opaque, whiteout, redirect, metacopy, origin, impure, nlink, upper, uuid, protattr string
}

var (
	trustedNames = newXattrNames("trusted.overlay.")
	userNames    = newXattrNames("user.overlay.")
)

func newXattrNames(p string) *xattrNames {
	return &xattrNames{prefix: p, escaped: p + "overlay.",
		opaque: p + "opaque", whiteout: p + "whiteout", redirect: p + "redirect", metacopy: p + "metacopy", origin: p + "origin",
		impure: p + "impure", nlink: p + "nlink", upper: p + "upper", uuid: p + "uuid", protattr: p + "protattr"}
}

// private tells whether an xattr on disk is one of this overlay's own: neither
// shown nor copied up.
func (x *xattrNames) private(disk string) bool { return false }

// toDisk is where an xattr that is set or read in the mount stands on disk: one
// of the overlay's namespace is escaped.
func (x *xattrNames) toDisk(shown string) string { return shown }

// toShown is the inverse: ok is false for what is hidden.
func (x *xattrNames) toShown(disk string) (shown string, ok bool) { return disk, true }

// facts are what the overlay xattrs on one object say.
type facts struct {
	opaque     bool // "y"
	xwhiteouts bool // opaque is "x": zero-size files with xattr whiteout are whiteouts here
	whiteout   bool // has xattr whiteout
	impure     bool
	redirect   string // "": none; as on disk
	metacopy   bool
	meta       metacopy
	origin     []byte // as on disk; nil: none
	nlink      []byte // as on disk; nil: none
	others     bool   // has xattrs that are not overlayfs's own
	acl, capab bool   // has POSIX ACLs (access or default); security.capability
}

// readFacts reads all of them with one listxattr of name below dir ("": dir
// itself, which may be O_PATH). A value that is not as it must be is reported
// as a *corruptError; the fields are filled in for the rest.
func (x *xattrNames) readFacts(dir int, name string, f *facts) error { return syscall.ENOSYS }

// corruptError is an overlay xattr whose value is not valid.
type corruptError struct{ attr, why string }

func (e *corruptError) Error() string { return e.attr + ": " + e.why }
func (e *corruptError) Unwrap() error { return syscall.EIO }

// parseRedirect checks a redirect: a name without '/', or an absolute path of
// components that are neither empty nor "." nor "..".
func parseRedirect(b []byte) (string, error) { return "", syscall.ENOSYS }

// metacopy is struct ovl_metacopy: the xattr of a file whose data are in a lower.
// A verity digest may follow.
type metacopy struct {
	flags      uint8
	digestAlgo uint8
	digest     []byte
}

func parseMetacopy(b []byte) (metacopy, error) { return metacopy{}, syscall.ENOSYS }
func (m metacopy) encode() []byte              { return nil }

// parseNlink reads xattr nlink ("U+1", "L-2") and returns the link count that is
// shown, of a file whose inode in upper has upper links and whose lower had lower.
func parseNlink(b []byte, upper, lower uint32) (uint32, error) { return 0, syscall.ENOSYS }

// formatNlink says shown links relative to the real count in upper ('U') or in
// the lower ('L').
func formatNlink(relTo byte, shown, real uint32) []byte { return nil }

// fileID is struct ovl_fb: an object of a file system that outlives renames, as
// xattrs origin and upper and the names in index have it.
type fileID struct {
	uuid   [16]byte
	handle sys.FileHandle
	upper  bool // OVL_FH_FLAG_PATH_UPPER: of an object in upper
	other  bool // of a machine with other byte order: valid, and of no use
}

// parseFileID reads one; zero length is a valid "unknown": ok false.
func parseFileID(b []byte) (id fileID, ok bool, err error) { return fileID{}, false, syscall.ENOSYS }

func (id *fileID) encode() []byte { return nil }

// indexName is the name in index: the encoding in lower-case hex.
func (id *fileID) indexName() string { return "" }
