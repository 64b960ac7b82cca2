package sys

import "golang.org/x/sys/unix"

// Foreground reports whether this process belongs to the foreground group of
// its controlling terminal, which gets the terminal's signals (Ctrl-C).
func Foreground() bool {
	tty, err := Open("/dev/tty", O_RDONLY|unix.O_NOCTTY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	pgrp, err := unix.IoctlGetInt(tty.n, unix.TIOCGPGRP)
	return err == nil && pgrp == unix.Getpgrp()
}

// MakeRaw lets bytes pass the terminal f as they are, both ways, without echo.
func (f *Fd) MakeRaw() error {
	t, err := unix.IoctlGetTermios(f.n, unix.TCGETS)
	if err != nil {
		return f.err("ioctl TCGETS", "", err)
	}
	t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
	return f.err("ioctl TCSETS", "", unix.IoctlSetTermios(f.n, unix.TCSETS, t))
}

// Drain waits until all that was written to the terminal f has left it.
func (f *Fd) Drain() error {
	return f.err("ioctl TCSBRK", "", retry(func() error { return unix.IoctlSetInt(f.n, unix.TCSBRK, 1) }))
}
