package sys

import "golang.org/x/sys/unix"

// LoadModule loads the open kernel module: finit_module(2). EEXIST if it is
// loaded.
func (f *Fd) LoadModule() error {
	return f.err("finit_module", "", unix.FinitModule(f.n, "", 0))
}
