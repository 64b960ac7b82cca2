// Package overlay is the driver on the kernel's overlayfs: a layer is a
// directory, the upper while it is writable and a lower once it is committed.
//
// It is not a union file system of its own (package fuse is), performs no mount
// for its callers (package mount does), and knows no name, label or image.
//
// # On disk
//
//	ROOT/format.json     {"format":1,"xattrs":"trusted"}: the encoding of whiteouts
//	ROOT/probed.json     what the kernel answered in this boot
//	ROOT/empty.dir/      the lower of a chain that would have none
//	ROOT/ID/fs/          the layer's files, whiteouts as overlayfs has them
//	ROOT/ID/work/        overlayfs's scratch; gone once the layer is committed
//	ROOT/ID/about.json   what Create was asked for
//	ROOT/ID/applied.json directories that Apply made up, until a Commit names parents
//	ROOT/ID/rebase.json  what a Commit changes to fit the layer to parents; before the first change
//	ROOT/ID/rebase/      what is on its way to another place meanwhile
//	ROOT/ID/volatile     the boot in which the layer was mounted with "volatile"
//	ROOT/ID/committed.json  the layer is frozen: usage and parent; written last
//	ROOT/ID.new/         Create has not finished
//	ROOT/ID.del/         Remove has not finished
//	ROOT/probe.*         a probe that did not come to clean up
//
// ID is drivers.ID in base 36, so that many lowers fit one page of options.
//
// # Life cycle
//
// Create builds ID.new and renames it to ID; Commit flushes the file system and
// then writes committed.json; Remove renames ID to ID.del and deletes that. So
// every crash leaves one of the states above, and IDs lists them all.
//
// # Locks
//
// None. The store excludes calls on one ID from each other, and no call touches
// another layer's directory but to read what is committed.
//
// # Traps
//
//   - Module defaults (/sys/module/overlay/parameters, Kconfig) decide what an
//     option that is left out means. Every option that matters is given.
//   - redirect_dir=off means "follow" or "nofollow" by a module parameter. This
//     driver gives "follow", which makes no redirect and reads those there are.
//   - With index=off the kernel lets two mounts share an upper and only warns.
//     Package mount asks it first.
//   - A merged directory's metadata is that of its uppermost layer, so every
//     upper root repeats its parent's root.
//   - A rename between project ids is EXDEV, so work and upper share theirs.
//   - A lower directory that was renamed elsewhere (redirect) or a file without
//     data (metacopy) makes the upper alone unreadable. Diff therefore compares
//     what the kernel shows, and takes from the upper only where to look.
package overlay
