// Package union is a union file system without the wire: the semantics of the
// kernel's overlayfs (lookup through layers, merged directories, copy-up,
// whiteouts, redirects, metacopy, indexed hard links) as calls on inodes. There
// is no /dev/fuse in it; package fuse/server gives it to the kernel.
//
// On disk it is the kernel's overlayfs (linux/fs/overlayfs, 6.18), both ways: an
// upper written here mounts there with the same options and shows the same
// tree, and the reverse. Where the two differ, the difference is named in
// package fuse/uniontest with its reason.
//
// # Life cycle
//
// Open takes the layers, claims upper and work (as package mount does, so that
// no two mounts share an upper), empties work of what a killed server left and
// returns an FS whose root has one reference. Each call that returns an Entry
// gives the caller one reference to its Node; Forget returns them. A Node
// without references may go from memory at any time, and comes back with the
// same Attr.Ino. Close ends the FS; nothing needs to be written then.
//
// # Who changes the layers
//
// Lowers are never written. The upper is changed by this FS alone; what others
// do to the layers while it is open may show or not, but is never followed out
// of a layer: every step in a layer is one component, relative to a directory
// descriptor, and follows no symlink.
//
// # Locks
//
// In this order; a call takes no earlier one while it holds a later one:
//
//	FS.recalls    (RW) names go under the one side, a node comes back by its number
//	              under the other, so that what was just found is still there (NFSExport)
//	FS.renames    one rename between two directories at a time, so that which of
//	              two directories is in the other stays so
//	Node.change   of directories, ancestors first (two that are not, by Node.ID,
//	              under FS.renames alone); then of what is in them, by ID: held by
//	              who changes names in a directory, or a node, or copies it up, while
//	              it does so; I/O happens under it. A file in the upper keeps its
//	              name while its own is held
//	File.mu       which descriptor an open file has; taken before its Node.change
//	              by who holds no other
//	FS.tree       (RW) where directories are: written by a rename of a directory for
//	              the system call alone, read by whoever walks from a directory to
//	              the root, to open it or to name it
//	Node.mu       fields of a node; no I/O under it
//	FS.dirs       the cache of directory descriptors
//	handleTable   the records of file handles, and reading and writing them
//	FS.table      Node.ID to Node, identity to Node, reference counts
//
// A lookup takes none of them but the last: it reads the layers and then asks the
// table for the node. What it has read is stale if something in the directory was
// copied up or has changed meanwhile (FS.epoch), if a copy-up has made its file and
// not told yet (FS.copies), or if names are just being taken away (dirState.busy):
// then it waits, without a lock, and looks again.
//
// Parents are copied up before a node's own lock is taken, outermost first; a
// node that is in the upper stays there, so nobody has to look again. So are the data
// of a large file, into work: who wants the same one waits at FS.builds, with no lock.
//
// # Crash
//
// A change that needs several system calls is built in work and moved into its
// place by one rename (linux/fs/overlayfs/dir.c does the same), so a server
// that is killed between any two calls leaves the old tree or the new one.
package union
