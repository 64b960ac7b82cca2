package main

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// inPrivateNamespace runs the program again in a mount namespace of its own, so
// that nothing it mounts outlives it. It returns true in that second life.
func inPrivateNamespace() (bool, error) {
	const marker = "FUSE_BENCH_NAMESPACE"
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
	base, err := os.MkdirTemp("/dev/shm", "fuse-bench-")
	if err != nil {
		return "", nil, err
	}
	img, dir := filepath.Join(base, "img"), filepath.Join(base, "fs")
	clean := func() { _ = os.RemoveAll(base) }
	for _, c := range [][]string{
		{"chmod", "755", base},
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
		if err := command("umount", "-R", dir); err != nil {
			fmt.Fprintln(os.Stderr, "fuse:", err)
			_ = command("umount", "-l", dir)
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

func isMounted(dir string) bool {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		if w := strings.Fields(sc.Text()); len(w) > 4 && w[4] == dir {
			return true
		}
	}
	return false
}

// processesNaming finds the processes that have dir as an argument.
func processesNaming(dir string) []int {
	var pids []int
	all, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, p := range all {
		b, err := os.ReadFile(p)
		if err != nil || !slices.ContainsFunc(bytes.Split(b, []byte{0}), func(a []byte) bool { return string(a) == dir }) {
			continue
		}
		pid, _ := strconv.Atoi(strings.Split(p, "/")[2])
		pids = append(pids, pid)
	}
	return pids
}

// cpuOf is the CPU time, user and system, of other processes.
func cpuOf(pids []int) time.Duration {
	const tick = 10 * time.Millisecond // USER_HZ, for programs of any architecture 100
	var sum time.Duration
	for _, pid := range pids {
		// schedstat of each thread counts nanoseconds, but only of threads alive;
		// stat counts all, in ticks.
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)); err == nil {
			w := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
			user, _ := strconv.Atoi(w[11])
			system, _ := strconv.Atoi(w[12])
			sum += time.Duration(user+system) * tick
		}
	}
	return sum
}

// residentMiB is the resident memory of processes.
func residentMiB(pids []int) float64 {
	var kib int
	for _, pid := range pids {
		b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
		for line := range strings.Lines(string(b)) {
			if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
				n, _ := strconv.Atoi(strings.Fields(v)[0])
				kib += n
			}
		}
	}
	return float64(kib) / 1024
}

// cpuOfOurs is the CPU time of this process and of the children it waited for.
func cpuOfOurs() time.Duration {
	var sum time.Duration
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var ru syscall.Rusage
		if err := syscall.Getrusage(who, &ru); err == nil {
			sum += time.Duration(ru.Utime.Nano() + ru.Stime.Nano())
		}
	}
	return sum
}

// dropCaches makes what comes cold. Dirty pages first, which cannot be dropped.
func dropCaches() error {
	syscall.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}
