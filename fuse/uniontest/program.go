package uniontest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/layerctl/layerctl/internal/sys"
)

// Program is a FUSE server with the command line of fuse-overlayfs:
//
//	path -f -o lowerdir=..,upperdir=..,workdir=..,... TARGET
//
// options are given before those of each mount.
func Program(path string, options ...string) *Subject {
	p := programFile{path: path, options: options}
	return &Subject{Name: "program", Mount: p.mount, Differences: map[Difference]string{
		NoClone:        "FUSE has no such operation",
		NoShift:        "the kernel's FUSE refuses them itself (fs/fuse/file.c: fuse_file_fallocate)",
		KeepsTimes:     "opening a file is no change of it; the kernel's mtime is that of its copying",
		LinksLater:     "FUSE says which inode is opened, not by which name",
		NoRepair:       "a lookup writes nothing; inode numbers are the same without",
		UserRedirects:  "a directory of a lower could not be renamed otherwise by who is not root",
		SetIDLater:     "in passthrough the kernel writes with the credentials that opened the file below; without CAP_FSETID among them no user's write leaves the bits",
		LostNames:      "POSIX wants it; the kernel's copy-up needs the name and fails",
		FailedRenames:  "the kernel copies up, sets redirects and changes mtimes before it finds names in an upper directory",
		TrueNumbers:    "the kernel keeps a directory's numbers, and a link or rename into it without whiteouts does not renew them",
		StrayWhiteouts: "so the kernel's documentation has it; the kernel itself lists such a file and does not find it",
		InUseRefused:   "two servers on one upper corrupt it, so the second is refused whatever index says",
	}}
}

type programFile struct {
	path    string
	options []string
}

// server is one running program.
type server struct {
	target string
	cmd    *exec.Cmd
	output *syncBuffer
	ended  chan struct{} // closed when the process has been waited for
	err    error         // of Wait; valid when ended is closed
	killed bool
}

// syncBuffer is a bytes.Buffer for one writer and other readers.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return string(bytes.TrimSpace(s.b.Bytes()))
}

func (p programFile) mount(ctx context.Context, s Spec, target string) (Mounted, error) {
	before, err := sys.StatPath(target)
	if err != nil {
		return nil, err
	}
	data := s.data()
	for _, o := range p.options {
		data = o + "," + data
	}
	if s.option("ro") != "" {
		data = "ro," + data
	}
	m := &server{target: target, output: &syncBuffer{}, ended: make(chan struct{})}
	m.cmd = exec.Command(p.path, "-f", "-o", data, target)
	m.cmd.Stdout, m.cmd.Stderr = m.output, m.output
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		m.err = m.cmd.Wait()
		close(m.ended)
	}()
	late := time.AfterFunc(patience, func() { m.Kill() }) // a stat of the target may hang with the server
	defer late.Stop()
	return m, m.waitMounted(ctx, before)
}

// waitMounted waits until target is another file system than before.
func (m *server) waitMounted(ctx context.Context, before sys.Stat) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		now, err := sys.StatPath(m.target)
		if err == nil && now.MountID != before.MountID {
			return nil
		}
		select {
		case <-m.ended:
			return fmt.Errorf("%s: %w: %s", m.cmd.Path, errOr(m.err, errors.New("ended without mounting")), m.output)
		case <-ctx.Done():
			m.Kill()
			return fmt.Errorf("%s did not mount: %w: %s", m.cmd.Path, ctx.Err(), m.output)
		case <-time.After(pause):
		}
	}
}

func errOr(err, other error) error {
	if err != nil {
		return err
	}
	return other
}

// Unmount unmounts and waits for the server's end, which must be a good one.
func (m *server) Unmount() error {
	err := unmount(m.target)
	if err != nil {
		_ = m.cmd.Process.Kill()
	}
	select {
	case <-m.ended:
	case <-time.After(patience):
		_ = m.cmd.Process.Kill()
		<-m.ended
		return errors.Join(err, fmt.Errorf("%s did not end after its mount: %s", m.cmd.Path, m.output))
	}
	if m.err != nil && !m.killed {
		err = errors.Join(err, fmt.Errorf("%s: %w: %s", m.cmd.Path, m.err, m.output))
	}
	return err
}

// Kill ends the server and waits for it.
func (m *server) Kill() bool {
	m.killed = true
	_ = m.cmd.Process.Signal(syscall.SIGKILL)
	<-m.ended
	return true
}
