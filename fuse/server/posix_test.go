package server_test

import (
	"os"
	"testing"

	"github.com/hanwen/go-fuse/v2/posixtest"
	"github.com/layerctl/layerctl/fuse/server"
	"github.com/layerctl/layerctl/internal/testenv"
)

// TestPosix runs go-fuse's own cases, with and without passthrough.
func TestPosix(t *testing.T) {
	for name, o := range map[string]server.Options{
		"passthrough": {Passthrough: server.PassthroughUppers},
		"writeback":   {Writeback: true},
		"cached":      {},
	} {
		t.Run(name, func(t *testing.T) {
			testenv.Leaks(t)
			m := serve(t, setup{Dir: dirs(t, "ext4"), Options: o})
			for name, test := range posixtest.All {
				if name == "FcntlFlockLocksFile" {
					continue // wants one process's two POSIX locks to conflict; fcntl(2) says they do not, and go-fuse leaves it out on other file systems, too
				}
				t.Run(name, func(t *testing.T) {
					dir := m.path(name)
					must(t, os.Mkdir(dir, 0o755))
					test(t, dir)
				})
			}
		})
	}
}
