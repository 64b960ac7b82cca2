package drivers

import (
	"context"
	"fmt"
	"io"
	"iter"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"

	"github.com/layerctl/layerctl/layer"
)

// ID names one layer's storage. The store assigns it and never reuses it; 0 is
// never a layer. A driver derives short path names from it (see ID.String).
type ID uint64

// String returns the ID in base 36, the form that drivers use in paths: 128
// overlay lowers must fit one page of mount options.
func (id ID) String() string { return strconv.FormatUint(uint64(id), 36) }

// ParseID is the inverse of ID.String. It refuses 0 and every spelling that
// String does not produce, so that a stray file is never taken for a layer.
func ParseID(s string) (ID, bool) {
	n, err := strconv.ParseUint(s, 36, 64)
	id := ID(n)
	return id, err == nil && id != 0 && id.String() == s
}

// Ref names a layer and the chain below it, nearest parent first. Parents are
// committed and outlive every call that names them. The zero Ref is the empty
// tree where a call takes one (Diff).
type Ref struct {
	ID      ID
	Parents []ID
}

// Driver keeps the bytes of layers: it makes a layer's storage on top of its
// parents, says how to mount it, freezes it, measures it and removes it. It
// knows no name, label, image, digest or database.
//
// Create, Commit and Remove of an ID exclude every other call on that ID (the
// store sees to it); Mounts, Usage and Diff of an ID may overlap; calls for
// different IDs always may. After an error or a cancelled ctx the ID is absent,
// or acceptable to Remove. Errors wrap one sentinel of containerd/errdefs and,
// where there was one, the syscall.Errno.
type Driver interface {
	// Capabilities is constant after Open: probed, never guessed from a version.
	Capabilities() Capabilities

	// Create makes the storage of r.ID on top of r.Parents. It wraps
	// ErrAlreadyExists if the ID is there, ErrInvalidArgument if the options ask
	// for what Capabilities deny. A cut afterwards may lose the layer whole.
	Create(ctx context.Context, r Ref, o CreateOptions) error

	// Mounts says how to mount r. It performs no mount; it makes ready what
	// mount(2) needs (activates a device) and is idempotent, after a reboot too.
	// Committed layers and views yield read-only mounts. ErrNotFound if r.ID is
	// not there.
	Mounts(ctx context.Context, r Ref, o MountOptions) ([]mount.Mount, error)

	// Commit freezes a writable layer and returns its usage. Once it returns nil
	// the layer survives power loss, unless o.Volatile. r.Parents may differ from
	// Create's only where that was empty and Capabilities.Rebase is set. It works
	// while a mount of the layer still exists (see package doc, Busy).
	Commit(ctx context.Context, r Ref, o CommitOptions) (Usage, error)

	// Remove deletes the layer's storage. Idempotent: an absent ID is nil. Wraps
	// ErrFailedPrecondition while the storage is in use (mounted).
	Remove(ctx context.Context, id ID) error

	// Usage is what the layer itself holds, parents excluded.
	Usage(ctx context.Context, r Ref) (Usage, error)

	// Owner is the inverse of Mounts: the layer that ms shows, and false if
	// these mounts are not this driver's. It understands what mountinfo reports
	// of such a mount, too.
	Owner(ms []mount.Mount) (ID, bool)

	// IDs yields every layer on disk in no order, half-made and half-removed
	// ones too: recovery needs them.
	IDs(ctx context.Context) iter.Seq2[ID, error]

	// Close releases what the driver holds and leaves mounts in place. Idempotent.
	Close() error
}

// Differ is the O(changes) diff of a driver that has one (Capabilities.Diff).
// Without it package layer walks both trees.
type Differ interface {
	// Diff yields what turns the tree of from into the tree of to, exactly, in
	// the order of layer.ComparePaths. Both refs are this driver's; to may be
	// active; from may be the zero Ref, the empty tree. A yielded Change is valid
	// until the next one is asked for.
	Diff(ctx context.Context, from, to Ref) iter.Seq2[layer.Change, error]
}

// Applier unpacks a layer straight into storage (Capabilities.Apply). Without
// it package layer unpacks into a mount.
type Applier interface {
	// Apply unpacks tar, an uncompressed stream, onto the writable layer r.
	Apply(ctx context.Context, r Ref, tar io.Reader, o layer.ApplyOptions) error
}

// Settler is a driver part of whose work goes on after its calls have returned:
// a file system counts and frees in the background.
type Settler interface {
	// SyncUsage flushes what Usage counts: its figures are those of now.
	SyncUsage(ctx context.Context) error
	// WaitFreed waits until the space of what Remove deleted is free. It reports
	// Progress; ErrUnavailable where this process cannot know.
	WaitFreed(ctx context.Context) error
}

// Idler is a driver that keeps something in the kernel for a layer that Mounts was asked
// for, which may never have been mounted, or is no longer.
type Idler interface {
	// DropIdle takes that away where nobody uses it and no Mounts has named the layer for
	// a while. What cannot go now goes another time.
	DropIdle(ctx context.Context) error
}

// UseTeller is a driver that can tell without removing it that a layer is in use.
type UseTeller interface {
	// InUse wraps ErrFailedPrecondition and says where, if the layer is mounted or
	// served as far as this process can see: where Remove would refuse it.
	InUse(ctx context.Context, id ID) error
}

// QuotaEnabler is a driver whose quota needs an accounting of the whole file
// system, which only its operator may switch on.
type QuotaEnabler interface {
	// EnableQuota switches accounting of a kind on and waits until it has counted
	// what is there; ErrInvalidArgument names the kinds. Drivers that are opened
	// from then on have Capabilities.Quota.
	EnableQuota(ctx context.Context, kind string) error
}

// Deduper is a driver that can make equal files of committed layers share their
// blocks.
type Deduper interface {
	// Dedup makes the equal files of the layers, which are committed, share
	// blocks. No content and no metadata changes. A layer that is removed
	// meanwhile is passed over. It reports Progress.
	Dedup(ctx context.Context, layers []Ref, o DedupOptions) (DedupReport, error)
}

// Inspector is a driver into whose layers somebody can put what the driver refuses to
// go on with, behind its back.
type Inspector interface {
	// Inspect says by name what is in a layer that is not the driver's, so that Commit
	// or Remove would refuse it: an error that wraps ErrFailedPrecondition. What is lost
	// is for Mounts to say.
	Inspect(ctx context.Context, id ID) error
}

// DedupOptions say how far Dedup goes.
type DedupOptions struct {
	DryRun bool // find out only
}

// DedupReport is what Dedup found and did.
type DedupReport struct {
	Layers int64 // that were looked at
	Files  int64 // with blocks of their own
	Equal  int64 // of which another has the content, in blocks of its own
	Bytes  int64 // of those files: what is shared now, or would be
}

// CreateOptions say what kind of storage Create makes. The zero value is a
// writable layer without quota, whose root belongs to 0:0 or looks like the
// parent's root.
type CreateOptions struct {
	// ReadOnly makes a view: it can be mounted and removed, never committed.
	ReadOnly bool
	// Quota bounds what may be written, in bytes; 0 means no limit. Needs
	// Capabilities.Quota. One that the driver cannot give, below LeastQuota or below
	// the parent's size for one, is ErrInvalidArgument: who has it from a hint leaves
	// it out then.
	Quota int64
	// RootOwner owns the root directory of a parentless layer; nil means 0:0. That
	// directory's mode is 0755 and its times are 0, the same on every driver.
	RootOwner *Owner
	// IDMap is how this layer shows owners (containerd's remap-ids): ids of the
	// parents' files on disk are container ids, shown shifted to host ids. Needs
	// Capabilities.IDMap. Empty means as stored.
	IDMap IDMap
	// Volatile skips flushing of what Create makes.
	Volatile bool
}

// Owner is a numeric user and group.
type Owner struct{ UID, GID uint32 }

// IDMap maps user and group ids, as in /proc/PID/uid_map.
type IDMap struct{ UIDs, GIDs []IDRange }

// IsZero reports whether m maps nothing, which means: as stored.
func (m IDMap) IsZero() bool { return len(m.UIDs) == 0 && len(m.GIDs) == 0 }

// MountOptions spells the map as containerd's mount.All and package mount read it:
// "uidmap=CONTAINER:HOST:SIZE,...", "gidmap=...". None for an empty map.
func (m IDMap) MountOptions() []string {
	if m.IsZero() {
		return nil
	}
	return []string{"uidmap=" + idRanges(m.UIDs), "gidmap=" + idRanges(m.GIDs)}
}

func idRanges(rs []IDRange) string {
	s := make([]string, len(rs))
	for i, r := range rs {
		s[i] = fmt.Sprintf("%d:%d:%d", r.ContainerID, r.HostID, r.Size)
	}
	return strings.Join(s, ",")
}

// IDRange maps Size ids: ContainerID.. inside to HostID.. outside.
type IDRange struct{ ContainerID, HostID, Size uint32 }

// MountOptions say how a layer is to be mounted. The zero value is: writable
// if the layer is, to be performed by package mount.
type MountOptions struct {
	// ReadOnly mounts a writable layer read-only.
	ReadOnly bool
	// Volatile trades durability for speed where the file system offers it
	// (overlay "volatile"). The layer is lost on a crash, and says so.
	Volatile bool
	// External asks for mounts that others perform by mount(2) with one page of
	// options (containerd of any version). Mounts wraps ErrFailedPrecondition,
	// naming the number of lowers, where that cannot be.
	External bool
	// IDMap shows owners shifted; see CreateOptions.IDMap. Overrides it when set.
	IDMap IDMap
}

// CommitOptions say how a layer is frozen.
type CommitOptions struct {
	// Volatile skips flushing: a power cut may lose the layer or its content.
	Volatile bool
}

// Usage is what a layer holds itself, parents excluded.
type Usage struct {
	Bytes  int64 // allocated, st_blocks*512; a hard-link group counts once; -1: cannot be known
	Inodes int64 // -1: cannot be known
}

// Capabilities is what a driver can do here, found by trying. What DESIGN
// requires of a driver and is false here on a kernel that has the feature is a
// failing test, not a capability.
type Capabilities struct {
	Driver string // the factory's name

	Diff   bool // implements Differ
	Apply  bool // implements Applier
	Rebase bool // Commit may name parents when Create had none
	Quota  bool // CreateOptions.Quota works on this file system
	// LeastQuota: a layer's quota is the size of its file system, which is never
	// smaller than its parent's; this is the size of one without parent. 0: any quota
	// will do.
	LeastQuota int64
	IDMap      bool // CreateOptions.IDMap works on this file system
	Reflink    bool // copies share blocks
	Copies     bool // a layer holds its parents' files, too (native): Usage counts them

	UsageBytes  bool // Usage.Bytes is never -1
	UsageInodes bool // Usage.Inodes is never -1
	// UsageBlocks: Usage.Bytes counts blocks of a device, those of a file system's
	// journal and tables too, in larger pieces than files have.
	UsageBlocks bool

	// MaxParents bounds the chain that package mount can mount; ExternalParents
	// the chain that others can (MountOptions.External). 0 means no limit.
	MaxParents      int
	ExternalParents int

	// Named differences from a plain directory, each proven by drivertest.

	// BreaksHardLinks: a change to one name of a lower hard-link group separates
	// it from the others (overlayfs without index).
	BreaksHardLinks bool
	// DirRenameEXDEV: renaming a directory that a parent has fails with EXDEV
	// (overlayfs without redirect_dir).
	DirRenameEXDEV bool
	// SharedWriter: a writer that keeps a file open over Commit still reaches the
	// committed layer (overlay, fuse, native); refused where our own namespace
	// shows the mount.
	SharedWriter bool
	// LinksSettle: a parent's file that gets another name shows one inode number
	// under all its names only once the layer is mounted again, and to rename one
	// of them to another is ESTALE until then (overlayfs in a user namespace, which
	// cannot note where a copy came from).
	LinksSettle bool

	// Lost names what this process cannot store here ("owners outside the user
	// namespace", "device nodes"). Empty: nothing is lost.
	Lost []string
}
