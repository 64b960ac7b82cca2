package sys

import "unsafe"

const SizeofDiskQuota = unsafe.Sizeof(fsDiskQuota{})
