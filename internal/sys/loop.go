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
