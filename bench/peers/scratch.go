package main

import (
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
)

// inPrivateNamespace runs the program again in a mount namespace of its own, so
// that nothing it mounts outlives it. It returns true in that second life.
func inPrivateNamespace() (bool, error) {
	const marker = "PEERS_NAMESPACE"
	if os.Getenv(marker) != "" {
		return true, syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, "")
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	signal.Ignore(os.Interrupt)
	return false, cmd.Run()
}

// scratch mounts a fresh ext4 on a loop file in memory: the disk is not what is
// measured, and all subjects have the same one.
func scratch(size string) (string, func(), error) {
	base, err := os.MkdirTemp("/dev/shm", "peers-")
	if err != nil {
		return "", nil, err
	}
	img, dir := filepath.Join(base, "img"), filepath.Join(base, "fs")
	clean := func() { os.RemoveAll(base) }
	for _, c := range [][]string{
		{"truncate", "-s", size, img},
		{"mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", img},
		{"mkdir", dir},
		{"mount", "-o", "loop", img, dir},
	} {
		if err := command(c...); err != nil {
			clean()
			return "", nil, err
		}
	}
	return dir, func() {
		if err := command("umount", dir); err != nil {
			fmt.Fprintln(os.Stderr, "peers:", err)
			return
		}
		clean()
	}, nil
}

// command runs a program and puts what it said into the error.
func command(args ...string) error {
	out, err := exec.Command(args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", strings.Join(args, " "), err, out)
	}
	return nil
}

// absent returns a subject's missing func for a program that must be installed.
func absent(program string) func() string {
	return func() string {
		if _, err := exec.LookPath(program); err != nil {
			return program + " is not installed"
		}
		return ""
	}
}

func goroot() (string, error) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	return strings.TrimSpace(string(out)), err
}
