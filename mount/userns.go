package mount

import (
	"fmt"
	"os"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
)

// namespace makes a user namespace that maps ids as m says and returns it open.
// The namespace lives as long as something holds it: the descriptor, or a mount
// that is mapped by it.
//
// A user namespace can only be made with a new process, because unshare(2)
// refuses one to a process with threads. The child is traced, so it stops when
// it would execute its first instruction, and is killed there: not one line of
// the program runs in it.
func (m idmap) namespace() (*sys.Fd, error) {
	p, err := os.StartProcess("/proc/self/exe", []string{"user-namespace"}, &os.ProcAttr{
		Env: []string{},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: procMap(m.uids),
			GidMappings: procMap(m.gids),
			Ptrace:      true,
			Pdeathsig:   syscall.SIGKILL,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("user namespace with uids %v, gids %v: %w", m.uids, m.gids, err)
	}
	defer func() {
		_ = p.Kill()
		_, _ = p.Wait()
	}()
	return sys.Open(fmt.Sprintf("/proc/%d/ns/user", p.Pid), sys.O_RDONLY, 0)
}

func procMap(rs []idRange) []syscall.SysProcIDMap {
	var all []syscall.SysProcIDMap
	for _, r := range rs {
		all = append(all, syscall.SysProcIDMap{ContainerID: r.container, HostID: r.host, Size: r.size})
	}
	return all
}
