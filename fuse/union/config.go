package union

// Config says what an FS is made of. Zero values are the kernel's safe ones:
// nothing that is on disk is followed or written beyond plain layers.
type Config struct {
	Lowers     []string // nearest first; may be empty only with an Upper
	DataLowers []string // reached by redirects of metacopy files alone ("lowerdir=A::D")
	Upper      string   // "": read-only
	Work       string   // on Upper's file system; needed with Upper

	Redirect  RedirectMode
	Metacopy  bool // copy up metadata alone where that is enough, and read such files
	Index     bool // keep hard links over copy-up, in work/index
	NFSExport bool // file handles that survive Forget, in work/index
	Xino      bool // xino=on was asked for: new directories are opaque, as the kernel's
	Volatile  bool // flush nothing; leaves work/work/incompat/volatile while mounted
	Xattrs    XattrMode
	ReadOnly  bool // with an Upper that is shown but not written

	// AUFSWhiteouts honours .wh.NAME and .wh..wh..opq, as OCI layers and
	// fuse-overlayfs have them. Where nothing else can be written, it is always on.
	AUFSWhiteouts bool

	// IDMap maps ids as the layers store them to ids as they are shown
	// (fuse-overlayfs's uidmapping, gidmapping); Squash then replaces owners.
	IDMap  IDMap
	Squash Squash

	// Permissions says where owner, mode and type of files are kept: in the inode
	// or in an xattr (fuse-overlayfs's xattr_permissions).
	Permissions Permissions

	// Atime says when times of access in the upper move, NoDirAtime that those of
	// directories do not. Lowers keep theirs. A process that may not make mounts, or
	// may not change how they keep such times, has them as the upper's file system is
	// mounted.
	Atime      Atime
	NoDirAtime bool

	// StaticNlink shows 1 as the link count of every directory.
	StaticNlink bool
	// NoACL answers EOPNOTSUPP to POSIX ACLs.
	NoACL bool

	// MaxDirs bounds the directory descriptors kept open; 0: a quarter of
	// RLIMIT_NOFILE, at most 4096.
	MaxDirs int

	// Log is told once of each thing in the layers that is not as it must be (a
	// corrupt xattr, a lower that changed); nil: nobody. It must not block.
	Log func(format string, args ...any) `json:"-"`
	// Invalidate, when not nil, is told that what the kernel may have cached of a
	// node is stale for another reason than the call that is being answered:
	// another name of a file was copied up, a link count changed. It may be called
	// with locks held and must not call back into the FS.
	Invalidate func(Stale) `json:"-"`
	// Step is called between two steps of each change, by name; tests fail or
	// kill there. nil: nobody.
	Step func(step string) error `json:"-"`
}

// Stale is what Invalidate is told.
type Stale struct {
	Node uint64 // Node.ID
	Data bool   // content too, not only attributes
	// Names: directory Node is listed otherwise than it was.
	Names bool
	// Name, when not "", is the entry of directory Node that is stale, and
	// nothing else is.
	Name string
}

// RedirectMode is overlayfs's redirect_dir.
type RedirectMode int

// The values of redirect_dir. RedirectFollow reads redirects and makes none:
// renaming a directory that is not purely upper is EXDEV.
const (
	RedirectNoFollow RedirectMode = iota
	RedirectFollow
	RedirectOn
)

// XattrMode is the namespace of overlayfs's own xattrs.
type XattrMode int

// XattrAuto is XattrTrusted where trusted.* can be written (and read, without
// an Upper), else XattrUser.
const (
	XattrAuto    XattrMode = iota
	XattrTrusted           // trusted.overlay.*
	XattrUser              // user.overlay.*, the option userxattr
)

// IDRange maps Size ids: Host ones are in the layers, Shown ones are seen.
type IDRange struct{ Shown, Host, Size uint32 }

// IDMap maps owners; empty: as they are. Ids outside of the ranges are shown as
// the overflow id 65534.
type IDMap struct{ UIDs, GIDs []IDRange }

// Squash replaces every owner that is shown; nil: as it is.
type Squash struct{ UID, GID *uint32 }

// Atime is when the time of access of a file in the upper moves.
type Atime int

// AtimeRelative moves it at the first access after a change, and once a day: what
// mount(2) does by itself.
const (
	AtimeRelative Atime = iota
	AtimeNever
	AtimeAlways
)

// Permissions is fuse-overlayfs's xattr_permissions.
type Permissions int

// PermissionsInode is the plain way. The others keep "uid:gid:mode:type" in an
// xattr: trusted or privileged (1), or user.containers.override_stat (2).
const (
	PermissionsInode Permissions = iota
	PermissionsPrivileged
	PermissionsContainers
)
