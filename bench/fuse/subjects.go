package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// rootlessPrefix marks a subject that runs as root of a user namespace, where
// FUSE has no passthrough.
const rootlessPrefix = "rootless "

// subject is somebody who makes a union, or something like one.
type subject struct {
	name string
	// plain subjects have one directory and no layers.
	plain bool
	// command mounts; nil means the plain directory itself.
	command func(l layers, mnt string) []string
	// program is the file that must be there; "" means none.
	program string
	// foreground is set for a program that does not go to the background itself.
	foreground bool
}

// layers is what is below a mount.
type layers struct{ lowers, upper, work string }

func (l layers) options() string {
	return "lowerdir=" + l.lowers + ",upperdir=" + l.upper + ",workdir=" + l.work
}

func allSubjects() []subject {
	union := func(name, program, more string) subject {
		return subject{name: name, program: program, command: func(l layers, mnt string) []string {
			return []string{program, "-o", l.options() + more, mnt}
		}}
	}
	kernel := func(name, more string) subject {
		return subject{name: name, command: func(l layers, mnt string) []string {
			return []string{"mount", "-t", "overlay", "overlay", "-o", l.options() + more, mnt}
		}}
	}
	more := ""
	if *options != "" {
		more = "," + *options
	}
	all := []subject{
		{name: "native", plain: true},
		kernel("kernel", ""),
		union("fuse-layerfs", *layerfs, more),
		union("fuse-overlayfs", *debian, ""),
		union("fuse-overlayfs-newest", *newest, ""),
		{name: "go-fuse-loopback", plain: true, program: *loopback, foreground: true, command: func(l layers, mnt string) []string {
			return []string{*loopback, "-q", "-allow-other", mnt, l.upper}
		}},
		kernel(rootlessPrefix+"kernel", ",userxattr"),
		union(rootlessPrefix+"fuse-layerfs", *layerfs, more),
		union(rootlessPrefix+"fuse-overlayfs", *debian, ""),
		union(rootlessPrefix+"fuse-overlayfs-newest", *newest, ""),
	}
	return all
}

// why says why a subject cannot do a workload here; "" if it can.
func why(w workload, s subject) string {
	if s.plain && w.union {
		return "no union"
	}
	if s.command == nil || s.program == "" && s.name != "go-fuse-loopback" && !strings.Contains(s.name, "newest") {
		return ""
	}
	if s.program == "" {
		return "not given"
	}
	if _, err := os.Stat(s.program); err != nil {
		return "not built"
	}
	return ""
}

// mounted is a subject's mount and who serves it.
type mounted struct {
	dir     string
	servers []int
	cmd     *exec.Cmd
	fuse    bool
}

// mount makes the subject's mount in dir/run, with a fresh upper.
func (s subject) mount(dir string, w workload) (*mounted, layers, error) {
	base := filepath.Join(dir, "run")
	if err := os.RemoveAll(base); err != nil {
		return nil, layers{}, err
	}
	l := layers{
		lowers: filepath.Join(dir, "lower2") + ":" + filepath.Join(dir, "lower1"),
		upper:  filepath.Join(base, "upper"), work: filepath.Join(base, "work"),
	}
	mnt := filepath.Join(base, "mnt")
	for _, d := range []string{l.upper, l.work, mnt} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, l, err
		}
	}
	if s.plain && w.reads {
		l.upper = filepath.Join(dir, "lower1")
	}
	m := &mounted{dir: mnt, fuse: s.program != ""}
	if s.command == nil {
		m.dir = l.upper
		return m, l, nil
	}
	return m, l, s.start(m, l)
}

func (s subject) start(m *mounted, l layers) error {
	args := s.command(l, m.dir)
	m.cmd = exec.Command(args[0], args[1:]...)
	said, err := os.CreateTemp("", "fuse-bench-")
	if err != nil {
		return err
	}
	defer os.Remove(said.Name())
	defer said.Close()
	m.cmd.Stdout, m.cmd.Stderr = said, said
	if s.foreground {
		err = m.cmd.Start()
	} else {
		err = m.cmd.Run()
		m.cmd = nil
	}
	for range 1000 { // ten seconds
		if err != nil || isMounted(m.dir) {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
	if err == nil && !isMounted(m.dir) {
		err = fmt.Errorf("nothing is mounted at %s", m.dir)
	}
	if err != nil {
		text, _ := os.ReadFile(said.Name())
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, text)
	}
	if m.fuse {
		m.servers = processesNaming(m.dir)
		if len(m.servers) == 0 {
			return fmt.Errorf("no process serves %s", m.dir)
		}
	}
	return nil
}

// unmount unmounts and waits for the server's end, so that it costs the next run nothing.
func (m *mounted) unmount() error {
	if !isMounted(m.dir) {
		return nil
	}
	var err error
	for range 100 {
		if err = command("umount", m.dir); err == nil {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	if m.cmd != nil {
		return m.cmd.Wait()
	}
	for range 1000 {
		if alive := processesNaming(m.dir); len(alive) == 0 {
			return nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return fmt.Errorf("the server of %s is still there after ten seconds", m.dir)
}
