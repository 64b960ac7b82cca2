// Package dm is the kernel's device-mapper by ioctl: one method a command of
// /dev/mapper/control, in types, no policy. Layouts are written out by hand, as
// include/uapi/linux/dm-ioctl.h has them on 64-bit little-endian machines, and
// tests hold them against golden bytes.
//
// # A device
//
// A device has a name, maybe a UUID, and two tables: an active one, which serves
// I/O, and an inactive one, which Load fills and Resume makes active. Create makes
// it without a table:
//
//	Create - Load - Resume - [Load - Suspend - Resume]* - Remove
//
// Suspend stops I/O, after a flush of what is under way and a freeze of the file
// system on it, unless its options say otherwise.
//
// # Device nodes
//
// The kernel makes /dev/dm-N by itself (devtmpfs); /dev/mapper/NAME is made by
// udev, where it runs (UdevRuns), and a Cookie waits until it has done so; Resume,
// Rename and Remove are what it hears of. MakeNode and RemoveNode do it where udev
// does not run.
//
// # Errors
//
// They name the command and the device, and wrap the errno and, where one fits, a
// sentinel of containerd/errdefs: ErrNotFound (ENXIO: no such device),
// ErrAlreadyExists (EBUSY of Create and Rename), ErrFailedPrecondition (EBUSY of
// others: it is open), ErrNotImplemented (no device-mapper, or an older one),
// ErrPermissionDenied. Why a table is refused the kernel says only in its log.
//
// A Control may be used by many goroutines at once.
package dm
