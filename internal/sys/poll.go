package sys

import "golang.org/x/sys/unix"

// Readable reports whether f has something to be read now: poll(2) that does not
// wait.
func (f *Fd) Readable() (bool, error) {
	p := []unix.PollFd{{Fd: int32(f.n), Events: unix.POLLIN}}
	var n int
	err := retry(func() (err error) {
		n, err = unix.Poll(p, 0)
		return err
	})
	return n == 1 && p[0].Revents&unix.POLLIN != 0, f.err("poll", "", err)
}
