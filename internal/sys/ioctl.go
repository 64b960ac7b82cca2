package sys

import (
	"runtime"
	"unsafe"
)

// Ioctl calls ioctl(2) on f with arg in and out, nil for a request without an
// argument. name is for errors. The caller gives arg the length and the layout
// that the request has: the kernel writes into it by what the request says. It
// must hold no pointer.
func (f *Fd) Ioctl(name string, request uint32, arg []byte) error {
	if size := int(request >> 16 & 0x3fff); len(arg) < size {
		panic("sys: ioctl " + name + ": argument is too short")
	}
	err := retry(func() error { return ioctl(f.n, uintptr(request), unsafe.Pointer(unsafe.SliceData(arg))) })
	runtime.KeepAlive(arg)
	return f.err("ioctl "+name, "", err)
}
