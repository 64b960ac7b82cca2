package sys

import "unsafe"

const SizeofDiskQuota = unsafe.Sizeof(fsDiskQuota{})

// SetNoXattrat makes the calls take the way of kernels before 6.13, or no more.
func SetNoXattrat(old bool) bool { return noXattrat.Swap(old) }

// SetNoFchmodat2 makes chmod take the way of kernels before 6.6, or no more.
func SetNoFchmodat2(old bool) bool { return noFchmodat2.Swap(old) }

// OldUUID is what FSUUID does before 6.9.
func OldUUID(f *Fd) ([16]byte, bool) { return f.oldUUID() }
