// Package btrfs keeps each layer as a btrfs subvolume: a snapshot of its parent's.
// Create costs the same whatever the parent holds, Commit is a read-only snapshot,
// Remove one call without a walk, Usage and Diff look at what changed.
//
// # On disk
//
//	ROOT/l/ID/        a layer; user.layerctl describes it (parent, birth, id map)
//	          fs      its subvolume while it is writable
//	          view    its subvolume if it is a view
//	          ro      its subvolume once it is committed
//	          diff.*/ a snapshot of fs for a Diff at work, flocked
//	ROOT/new/ID/      a layer being made; renamed to l/ID when it is whole
//	ROOT/del/ID/      a layer being deleted
//	ROOT/del/.qgroup-N  a deleted subvolume's qgroup that is to be dropped
//
// What a layer is stands in its names, which btrfs changes in transactions: there
// is no marker that a power cut could leave empty.
//
// # Steps, and what a crash leaves
//
//	Create   new/ID made, subvolume made, described | renamed to l/ID
//	Commit   checked | ro made, a snapshot of fs | fs deleted
//	Remove   l/ID renamed to del/ID | subvolumes deleted, del/ID deleted
//	Diff     diff.X made and locked, snapshot made | both deleted
//
// Left of the bar the old state holds, right of it the new one. A committed layer
// may still have its fs: a mount of it was alive, or the process died. The next
// Create on it, or its Remove, deletes it. What a killed Diff left goes with the next
// Diff of the layer, its Commit, a Create on it, its Remove, or WaitFreed.
//
// # Locks
//
// None, but a flock on diff.*: the contract excludes calls of one ID, and calls of
// different IDs meet only in l, new and del, where the kernel orders them.
//
// # Traps
//
//   - A read-only flag does not flush what was written, a snapshot does: so Commit
//     takes a snapshot, whose transaction is on the disk when it returns. A volatile
//     one, too: what is not flushed is in no tree, and would not be counted.
//   - A subvolume that somebody made in a layer is not in a snapshot of it. Commit
//     and Diff refuse such a layer by name; Remove deletes them, deepest first.
//   - Without CAP_SYS_ADMIN there is no SEND and no tree search: Diff walks both
//     trees, Usage is unknown, and Remove empties a subvolume file by file unless the
//     file system is mounted with user_subvol_rm_allowed.
//   - SEND takes files of two siblings for one that are not: see siblings.go. A signal
//     makes it begin anew in the middle of its stream: see ioctl.Send.
//   - SNAP_DESTROY says EPERM of what is being sent, too, and of the default
//     subvolume; only who may not delete at all empties file by file.
//   - Files of two subvolumes never share device and inode number; a file that is
//     equal in both trees must be known to be so by SEND, or read.
package btrfs
