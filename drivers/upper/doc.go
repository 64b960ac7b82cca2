// Package upper keeps layers as directories in overlayfs's form: an upper while
// a layer is writable, a lower once it is committed. It is everything of a union
// driver that is about directories on disk (Create, Apply, Commit with its rebase,
// Diff, Usage, Remove, IDs, quota, id shift), and nothing of how layers are shown:
// that is a Union, which a driver brings. Drivers on this package have one layout,
// so that a root made by one opens under the other.
//
// It performs no mount for its callers (package mount does), and knows no name,
// label or image.
//
// # How to make a driver of it
//
// Probe, with NewScratch for a place to try things in. PrepareRoot; Open with a
// Config whose Union is yours; embed *Layers in your Driver, which makes it a
// drivers.Driver, Differ and Applier. Override what must do more: Mounts for a
// server that has to be ready, Remove and Close for servers to be ended. What a
// Union owes:
//
//   - Mount only spells. Plan says what is merged, whether its ids are shifted, what
//     is volatile. Use Plan.Bind first; where an ordinary user can mount nothing,
//     leave it and serve one directory, too.
//   - Who has a layer mounted is told by mountinfo alone (Owner, Remove, Commit). The
//     kernel's overlay shows its directories there. A server in user space must make
//     its mount's source (fsname=) the path of the layer's own directory: the
//     upper, or else the nearest lower. With mount type fuse or fuse.* that is then
//     recognised by every driver on this package, whoever made the mount.
//   - A server that writes an upper holds mount.Claim on it for its life; then no
//     mount of another kind takes the upper, and Remove finds it in use from every
//     namespace. A server that only reads a layer may hold a shared flock on its
//     directory (ID/fs) for the same reason.
//   - Merge gives a path. Where the caller may mount (root, root of a user
//     namespace) a mount attached nowhere is best: a crash leaves nothing. Elsewhere
//     it must be one that goes with the process. Diff asks the tree about the changed
//     names and their directories only, so it need not be fast for whole trees. Set
//     RealInodes only if the tree shows each file's own number and not that of its
//     origin; without it Diff compares bytes of files that were copied up.
//   - Uppers must need nothing else than the upper to be read: index=off, since an
//     index lives in work. redirect_dir and metacopy may be on; Diff follows them
//     through Merge, and a layer with metacopy files is noted (Plan.Metacopy).
//   - Id maps: see Config.StoredIDs.
//
// # On disk
//
//	ROOT/format.json     {"format":1,"xattrs":"trusted"}: the encoding of whiteouts
//	ROOT/empty.dir/      the lower of a chain that would have none
//	ROOT/ID/fs/          the layer's files, whiteouts as overlayfs has them
//	ROOT/ID/work/        the union's scratch; gone once the layer is committed
//	ROOT/ID/about.json   what Create was asked for
//	ROOT/ID/applied.json directories that Apply made up, until a Commit names parents
//	ROOT/ID/rebase.json  what a Commit changes to fit the layer to parents; before the first change
//	ROOT/ID/rebase/      what is on its way to another place meanwhile
//	ROOT/ID/volatile     the boot in which the layer was mounted with "volatile"
//	ROOT/ID/committed.json  the layer is frozen: usage and parent; written last
//	ROOT/ID.new/         Create has not finished
//	ROOT/ID.del/         Remove has not finished
//	ROOT/probe.*         a Scratch of a probe that did not come to clean up
//
// ID is drivers.ID in base 36, so that many lowers fit one page of options. Any other
// name in ROOT or in ROOT/ID is a driver's own: with a dot in ROOT, so that it is no
// ID. Remove deletes what is in ROOT/ID.
//
// # Life cycle
//
// Create builds ID.new and renames it to ID; Commit flushes the file system and
// then writes committed.json; Remove renames ID to ID.del and deletes that. So
// every crash leaves one of the states above, and IDs lists them all.
//
// # Locks
//
// None is held. The store excludes calls on one ID from each other, and no call
// touches another layer's directory but to read what is committed. Remove tries the
// flock of a layer's directory and lets it go.
//
// # Traps
//
//   - A merged directory's metadata is that of its uppermost layer, so every
//     upper root repeats its parent's root.
//   - A rename between project ids is EXDEV, so work and upper share theirs.
//   - A lower directory that was renamed elsewhere (redirect) or a file without
//     data (metacopy) makes the upper alone unreadable. Diff therefore compares
//     what the union shows, and takes from the upper only where to look.
//   - Inode numbers repeat in btrfs subvolumes: a layer holds none.
package upper
