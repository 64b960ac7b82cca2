// Package server gives a union to the kernel: the FUSE wire.
//
// # Life cycle
//
// New makes a Server; its Invalidate is what union.Config.Invalidate wants. The
// union is opened, Mount (or MountFusermount, or a descriptor that somebody else
// mounted) gives a /dev/fuse, and Serve answers its requests until the mount is
// gone. The layers are open before the mount is there, and nothing is ever
// resolved through it, so it may cover its own layers.
//
// # The wire
//
// go-fuse's types are the layout of the messages; the loop that reads them, the
// table that hands them out and the answer to INIT are ours: a request is read,
// handled and answered by one thread in two buffers that it keeps, where
// go-fuse's own server has a goroutine, a channel and fresh buffers for each.
//
// # What the kernel keeps
//
// Nobody else changes the layers, so names, their absence, attributes,
// directories and the pages of files stay in the kernel for a day, and what
// changes otherwise than by the kernel's own request is told to it (Invalidate).
// Attributes alone may be told from within a request; pages and names only from
// a goroutine of their own, since the kernel takes the inode's locks for them
// (fs/fuse/inode.c: fuse_reverse_inval_inode, dir.c: fuse_reverse_inval_entry).
//
// # Passthrough
//
// A file that is open in passthrough is read and written by the kernel in the
// file below (Linux 6.9). The kernel allows one file below for one inode, and
// either passthrough or its own page cache at one time (fs/fuse/iomode.c); it
// answers EIO to an open that breaks that, and would write into the wrong layer
// where the file below is an old one. See openFile for the rules that follow.
//
// # Locks
//
// flock, POSIX and OFD locks are not asked for, so that the kernel keeps them on
// its inode: all names of a file have one nodeid and so one inode, and no one
// else opens the layers' files. A copy-up does not lose them, which forwarding
// them to the files below would.
package server
