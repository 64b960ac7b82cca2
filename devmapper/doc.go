// Package devmapper keeps each layer as a thin device of a device-mapper thin pool
// with ext4 or xfs on it: a snapshot of its parent's device. Nothing is stacked
// when it is mounted, and the kernel copies blocks, not files. The pool is on sparse
// files below the driver's root, which grow, or on devices.
//
// # On disk
//
//	ROOT/pool.json, data, metadata, lock, users, grow, snapshot, snapshot.json  the pool (package thin)
//	ROOT/template.json  the empty ext4 that layers without parent begin as
//	ROOT/template-xfs.json  the same of an xfs
//	ROOT/l/ID           the record of a layer
//	ROOT/new/ID         that of a layer being made; renamed to l/ID when it is whole
//	ROOT/del/ID         that of a layer being removed
//	ROOT/tmp/THIN       an id of a thin device that is no layer's: of a snapshot that
//	                    a Commit or Diff takes, or of a template being made (flocked),
//	                    or one to be deleted
//
// Every id in the pool stands in one of these first: one that stands nowhere is free,
// whoever died.
//
// # Steps, and what a crash leaves
//
//	Create   recorded in new, snapshot made, transaction set | renamed to l
//	Commit   (nobody has it open) flushed, device removed | record replaced
//	Commit   (mounted) suspended, recorded in tmp, snapshot made, resumed, flushed | record replaced
//	Remove   record renamed to del | thin device deleted, record deleted
//
// Left of the bar the old state holds, right of it the new one. A device that a
// crash left suspended is resumed by the next call that has to do with it.
//
// # Locks
//
// ROOT/lock (thin.Pool.Exclusive) for whatever takes or gives back an id of the
// pool, for as long as that takes. Nothing in there waits for a device's user.
//
// # Traps
//
//   - Open counts are of the whole machine: a layer is in use whoever has it mounted.
//   - Close takes away the devices that nobody has open, unless another process has
//     the driver open: what Mounts said before is to be asked for again. So it is ten
//     minutes after Mounts said it: DropIdle takes the device away.
//   - A layer that is mounted for writing cannot be mounted read-only beside it (one
//     block device, one superblock); Diff looks at a snapshot.
//   - Data that a file system could not write, because the pool was full, is lost
//     without an error for whoever did not fsync. Apply does.
package devmapper
