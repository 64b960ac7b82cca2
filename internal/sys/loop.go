package sys

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// LoopOptions say how a file becomes a block device. The zero value is
// writable and stays until somebody clears it.
type LoopOptions struct {
	ReadOnly bool
	// Autoclear frees the device when its last user (a mount, a descriptor) goes.
	Autoclear bool
	// DirectIO bypasses the page cache of the backing file.
	DirectIO bool
}

// loopTries bounds the race with other takers of free loop devices: each try
// loses only if somebody else has won.
const loopTries = 256

// AttachLoop makes path a loop device and returns it open. Its Name is
// /dev/loopN. EBUSY only when other processes took every free device first.
func AttachLoop(path string, o LoopOptions) (*Fd, error) {
	access := O_RDWR
	if o.ReadOnly {
		access = O_RDONLY
	}
	back, err := Open(path, access, 0)
	if err != nil {
		return nil, err
	}
	defer back.Close()
	control, err := Open("/dev/loop-control", O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range loopTries {
		dev, err := attachFreeLoop(control, back, access, o)
		if err != unix.EBUSY {
			return dev, pathErr("loop", path, err)
		}
	}
	return nil, pathErr("loop", path, unix.EBUSY)
}

// attachFreeLoop tries one free device; EBUSY if another was quicker.
func attachFreeLoop(control, back *Fd, access int, o LoopOptions) (*Fd, error) {
	n, err := unix.IoctlRetInt(control.n, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return nil, err
	}
	dev, err := Open(fmt.Sprintf("/dev/loop%d", n), access, 0)
	if err != nil {
		return nil, err
	}
	config := unix.LoopConfig{Fd: uint32(back.n)}
	copy(config.Info.File_name[:len(config.Info.File_name)-1], back.name)
	if o.ReadOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	if o.Autoclear {
		config.Info.Flags |= unix.LO_FLAGS_AUTOCLEAR
	}
	if o.DirectIO {
		config.Info.Flags |= unix.LO_FLAGS_DIRECT_IO
	}
	if err := unix.IoctlLoopConfigure(dev.n, &config); err != nil {
		dev.Close()
		return nil, err
	}
	return dev, nil
}

// ClearLoop detaches the backing file of an open loop device (LOOP_CLR_FD):
// at once, or when the last user goes.
func (f *Fd) ClearLoop() error {
	return f.err("ioctl LOOP_CLR_FD", "", unix.IoctlSetInt(f.n, unix.LOOP_CLR_FD, 0))
}

// GrowLoop makes an open loop device as large as its backing file is now
// (LOOP_SET_CAPACITY).
func (f *Fd) GrowLoop() error {
	return f.err("ioctl LOOP_SET_CAPACITY", "", unix.IoctlSetInt(f.n, unix.LOOP_SET_CAPACITY, 0))
}

// LoopBacking returns device and inode number of an open loop device's backing
// file, as Stat has them; ENXIO if it has none.
func (f *Fd) LoopBacking() (dev, ino uint64, err error) {
	info, err := unix.IoctlLoopGetStatus64(f.n)
	if err != nil {
		return 0, 0, f.err("ioctl LOOP_GET_STATUS64", "", err)
	}
	// the kernel's huge_encode_dev (include/linux/kdev_t.h)
	major, minor := info.Device>>8&0xfff, info.Device&0xff|info.Device>>12&^0xff
	return major<<32 | minor, info.Inode, nil
}
