// Package ioctl is btrfs's ioctl interface in types: one function a request, no
// policy. Layouts are written out by hand, byte for byte as the kernel's headers
// have them (include/uapi/linux/btrfs.h and btrfs_tree.h, little-endian machines
// and x86-64's sizes, which are those of all 64-bit ones), and tests hold them
// against golden bytes.
//
// A Dir or subvolume is given as an open descriptor, not O_PATH. Errors are
// sys.Fd's: they name the request and wrap the errno. ENOTTY: this is not btrfs,
// or the kernel has not the request; Probe tells which requests there are.
//
// # Privilege
//
// Create, Snapshot, SetReadOnly, SubvolInfo, Children and UserPath need what the
// file permissions say, the owner of the subvolume for the second and third.
// Destroy needs CAP_SYS_ADMIN or the mount option user_subvol_rm_allowed. All
// else needs CAP_SYS_ADMIN in the first user namespace.
//
// # Durability
//
// Snapshot flushes the source's data and returns when its transaction is on the
// disk; SetReadOnly returns when its transaction is, and flushes nothing. Create
// and Destroy do not wait: Sync after them.
package ioctl
