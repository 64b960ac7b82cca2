package layer

// Whiteouts is how a tree on disk says "deleted below".
type Whiteouts int

// The encodings of a storage tree. A layer tar always has OCI's `.wh.` names.
const (
	// WhiteoutsNone: the tree is complete in itself; a whiteout that is applied
	// removes what it names.
	WhiteoutsNone Whiteouts = iota
	// WhiteoutsTrusted: overlayfs, 0/0 character devices and trusted.overlay.opaque.
	WhiteoutsTrusted
	// WhiteoutsUser: overlayfs mounted with userxattr: 0/0 devices where mknod
	// works, else xattr whiteouts, and user.overlay.opaque.
	WhiteoutsUser
)

// Limits bound what an archive may ask for. The zero value of each field means
// the default named beside it; -1 means no limit. A refusal names the entry.
type Limits struct {
	Entries   int64 // entries in one layer: 4,000,000
	Depth     int   // path components: 1,024
	PathBytes int   // length of a path: 4,096 * 4
	FileSize  int64 // apparent size of one file: 8 TiB
	Size      int64 // uncompressed bytes of one layer: 1 TiB
	XattrSize int   // bytes of one xattr value: 65,536
	Xattrs    int   // xattrs of one entry: 256
	PAXBytes  int   // bytes of one entry's PAX records: 1 MiB, which -1 cannot raise
	Sparse    int64 // apparent bytes of all sparse entries, whose holes cost an archive nothing: 64 GiB
	// Window is how many bytes of memory a zstd frame may ask for: 32 MiB, which
	// every encoder stays within that is not told otherwise (zstd(1) up to --ultra
	// -20). Decompress and NewBlobReader take it; with GOMEMLIMIT=48MiB a whole
	// Apply stays below 64 MiB.
	Window int64
}

// ApplyOptions say how a layer is unpacked. The zero value unpacks onto a
// complete tree and flushes it.
type ApplyOptions struct {
	// Whiteouts is the encoding that the target tree uses.
	Whiteouts Whiteouts
	// Lower is the directory of the merged tree below the target, where the
	// target alone is not the whole tree (an overlay upper). It is only read: to
	// resolve symlinks, to know which whiteouts hide something, and for the
	// metadata of directories that the archive passes through without naming
	// them. A path like /proc/self/fd/N is right for a detached mount. With "" an
	// overlay upper keeps every whiteout and opaque marker, as nobody knows what
	// it will lie on.
	Lower string
	// Implied, if not nil, is told at the end each directory that the archive
	// passed through without naming it and that was made with made-up metadata
	// because Lower is "" or has no such directory; with Lower "" the root "." too, if
	// the archive does not name it. A driver whose layers may get
	// their parents later (Capabilities.Rebase) sets these from the parents then.
	Implied func(path string)
	// Volatile skips flushing.
	Volatile bool
	// Limits bound the archive.
	Limits Limits
	// Listing receives an entry for each path the layer leaves behind, for the
	// tree digest; nil for none. See ListingWriter.
	Listing *ListingWriter
	// Progress, if not nil, is told the uncompressed bytes read so far.
	Progress func(bytes int64)
	// Skipped, if not nil, is told each entry, or part of one (an xattr, a
	// symlink's owner), that could not be stored and was left out (a device node
	// in a user namespace), with the reason; if nil such an entry is an error. It
	// is called by one goroutine at a time, not the caller's.
	Skipped func(path, reason string)
	// Unterminated takes an archive that ends without its two blocks of zeros;
	// otherwise only a *BlobReader, which knows the digest, may. Some programs
	// write none, and a cut at the end of an entry looks the same.
	Unterminated bool
	// OverrideStat keeps owner and mode that this process may not set in the
	// xattr user.containers.override_stat instead of failing.
	OverrideStat bool

	openDirs int // bound of open directories, for tests; 0 is the usual one
}
