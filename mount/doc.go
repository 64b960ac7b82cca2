// Package mount performs []Mount, the form in which drivers say how a layer is
// to be mounted: containerd's core/mount.Mount. It also undoes mounts, lists
// them, and finds out who keeps one busy.
//
// It is not a mount manager: it keeps no state, and knows no layer or driver. A
// process that dies leaves what was attached by All, and nothing of what
// Detached made.
//
// # How a mount is performed
//
// The options are parsed into a plan, which is pure; the plan is executed by
// fsopen, fsconfig, fsmount and move_mount. A mount is made whole while it is
// attached nowhere and becomes visible in one step: nobody sees a read-only
// bind while it is still writable. Overlay lowers are named one by one
// (lowerdir+), so 500 of them need no page of options, and each name may hold
// any byte. Kernels without these calls (before 5.2; lowerdir+ before 6.8) get
// mount(2), with its page.
//
// The options are containerd's: the words of fstab(5), "loop", "direct-io",
// "uidmap=" and "gidmap=" (CONTAINER:HOST:SIZE, several with commas in one
// element), overlay's "\:" and "\,", types "fuse.X" and "fuse3.X" through the
// mount helper. Beyond containerd's: "lowerdir+=" and "datadir+=" for overlay,
// "private", "slave", "shared", "unbindable" and their recursive forms with r,
// "nosymfollow", "lazytime".
//
// # One upper, one mount
//
// The kernel lets two overlays share an upper when index=off, and they corrupt
// each other. So a writable overlay is mounted under exclusive flocks on its
// upper and workdir, and only after the kernel has said that neither upper nor work are
// in use anywhere, in whatever mount namespace, attached or not (see probe.go).
// The error wraps ErrFailedPrecondition and EBUSY and names the mount.
//
// Lock order: the flocks on upper and workdir are taken last, after every lock
// of the caller, held only while mounting, and nothing else is locked under it.
//
// # Traps
//
//   - "rbind,ro" makes only the top mount read-only, as mount(8) and containerd
//     do; mounts below keep what they have.
//   - A read-only overlay needs two lowers; the kernel answers EINVAL to one.
//     Drivers return a bind instead.
//   - A descriptor of a mount keeps it busy: Tree.Close before Unmount.
//   - mountinfo tells the options of an overlay with the words it was mounted
//     with: lowerdir= with escapes after mount(2), lowerdir+= without after
//     fsconfig. Info.Mount gives one form.
package mount
