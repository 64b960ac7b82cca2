// Package overlay is the driver on the kernel's overlayfs. What is on disk, and
// everything that is done there, is package drivers/upper's; this package has what
// is the kernel's: which options it knows (probes), how a mount is spelled, and the
// mounts that Diff reads merged trees through.
//
// It is not a union file system of its own (package fuse is), performs no mount
// for its callers (package mount does), and knows no name, label or image.
//
// # On disk
//
// As package drivers/upper has it, and
//
//	ROOT/probed.json     what the kernel answered in this boot
//
// # Locks
//
// None.
//
// # Traps
//
//   - Module defaults (/sys/module/overlay/parameters, Kconfig) decide what an
//     option that is left out means. Every option that matters is given.
//   - redirect_dir=off means "follow" or "nofollow" by a module parameter. This
//     driver gives "follow", which makes no redirect and reads those there are.
//   - With index=off the kernel lets two mounts share an upper and only warns.
//     Package mount asks it first.
package overlay
