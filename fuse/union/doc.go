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
//	FS.tree       (RW) where directories are: written by a rename or removal of a
//	              directory, read by whoever walks from a directory to its root
//	Node.change   of directories, ancestors first, else by Node.ID; then of other
//	              nodes by ID: held by who changes names in a directory, or copies
//	              a node up, while it does so; I/O happens under it
//	Node.mu       fields of a node; no I/O under it but that of opening a directory
//	FS.dirs       the cache of directory descriptors
//	FS.table      Node.ID to Node, identity to Node, reference counts
//
// Parents are copied up before a node's own lock is taken, outermost first; a
// node that is in the upper stays there, so nobody has to look again.
//
// # Crash
//
// A change that needs several system calls is built in work and moved into its
// place by one rename (linux/fs/overlayfs/dir.c does the same), so a server
// that is killed between any two calls leaves the old tree or the new one.
package union
