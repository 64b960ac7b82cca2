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
