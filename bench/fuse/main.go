// Command fuse measures unions: the kernel's overlayfs, fuse-layerfs, fuse-overlayfs
// in two versions, go-fuse's loopback and the plain file system, in turn (A B C A B
// C ...), on one ext4 on a loop file in memory. Each run is a child process that
// mounts afresh, does one workload, checks that it was done, and is charged wall
// time, its own and its children's CPU time, and the server's.
//
// It is a module of its own, of the standard library alone.
//
//	go run . [-runs N] [-workload NAME,...] [-subject NAME,...] [-layerfs FILE] [-newest FILE] [-loopback FILE] [-json FILE]
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
)

var (
	runs     = flag.Int("runs", 5, "counted runs of each subject, after one that warms up")
	only     = flag.String("workload", "", "comma-separated workloads; empty means all but the slow ones; `list` names them")
	subjects = flag.String("subject", "", "comma-separated subjects; empty means all that are here")
	layerfs  = flag.String("layerfs", "../../bin/fuse-layerfs", "fuse-layerfs")
	debian   = flag.String("debian", "/usr/bin/fuse-overlayfs", "fuse-overlayfs as packaged")
	newest   = flag.String("newest", "", "the newest build of fuse-overlayfs's C source")
	loopback = flag.String("loopback", "", "a build of go-fuse's example/loopback")
	treeDir  = flag.String("tree", "", "the tree of the metadata workloads; empty means the Go toolchain's")
	options  = flag.String("o", "", "further mount options for fuse-layerfs, to compare its choices")
	fsSize   = flag.String("size", "8G", "size of the scratch file system, a loop file on /dev/shm")
	jsonFile = flag.String("json", "", "write every run's figures to this file")
	childJob = flag.String("child", "", "internal: WORKLOAD/SUBJECT to run once in -dir")
	childDir = flag.String("dir", "", "internal: the child's scratch directory")
)

func main() {
	flag.Parse()
	if err := realMain(); err != nil {
		fmt.Fprintln(os.Stderr, "fuse:", err)
		os.Exit(1)
	}
}

func realMain() error {
	if *childJob != "" {
		return child(*childJob, *childDir)
	}
	if *only == "list" {
		for _, w := range workloads {
			fmt.Printf("%-16s %s\n", w.name, w.about)
		}
		return nil
	}
	if again, err := inPrivateNamespace(); !again {
		return err
	}
	dir, done, err := scratch(*fsSize)
	if err != nil {
		return err
	}
	defer done()
	if err := makeLowers(dir); err != nil {
		return fmt.Errorf("the lower layers: %w", err)
	}
	printHeader()
	all, err := measureAll(dir)
	if err != nil {
		return err
	}
	if *jsonFile != "" {
		b, err := json.MarshalIndent(all, "", " ")
		if err != nil {
			return err
		}
		return os.WriteFile(*jsonFile, append(b, '\n'), 0o644)
	}
	return nil
}

// figures is what the runs of one subject cost.
type figures struct {
	Workload, Subject string
	Missing           string `json:",omitempty"`
	Runs              []run
}

// run is one run's cost, in milliseconds, and figures of the workload's own.
type run struct {
	WallMS, ClientMS, ServerMS float64
	Own                        map[string]float64 `json:",omitempty"`
}

func measureAll(dir string) ([]*figures, error) {
	var all []*figures
	for _, w := range workloads {
		if *only == "" && w.slow || *only != "" && !slices.Contains(strings.Split(*only, ","), w.name) {
			continue
		}
		var these []*figures
		for _, s := range allSubjects() {
			if w.rootless != strings.HasPrefix(s.name, rootlessPrefix) || !wanted(s) {
				continue
			}
			these = append(these, &figures{Workload: w.name, Subject: s.name, Missing: why(w, s)})
		}
		for r := range *runs + 1 {
			for i := range these {
				f := these[(i+r)%len(these)] // nobody is always first
				if f.Missing != "" {
					continue
				}
				got, err := once(f, dir)
				if err != nil {
					// The others go on; what fails is said where its figures would be.
					f.Missing = "failed: " + strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", " ")
					f.Runs = nil
					continue
				}
				if r > 0 {
					f.Runs = append(f.Runs, got)
				}
			}
		}
		printTable(w, these)
		all = append(all, these...)
	}
	return all, nil
}

func wanted(s subject) bool {
	return *subjects == "" || slices.Contains(strings.Split(*subjects, ","), strings.TrimPrefix(s.name, rootlessPrefix))
}

// once runs a workload once, in a child process.
func once(f *figures, dir string) (run, error) {
	args := append([]string{"/proc/self/exe"}, os.Args[1:]...)
	args = append(args, "-child", f.Workload+"/"+f.Subject, "-dir", dir)
	if strings.HasPrefix(f.Subject, rootlessPrefix) {
		self, err := os.Executable()
		if err != nil {
			return run{}, err
		}
		args[0] = self
		args = append([]string{"unshare", "--user", "--map-root-user", "--mount", "--propagation", "private"}, args...)
	}
	cmd := exec.Command(args[0], args[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	var out, errs strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		return run{}, fmt.Errorf("%w: %s", err, errs.String())
	}
	var got run
	if err := json.Unmarshal([]byte(out.String()), &got); err != nil {
		return run{}, fmt.Errorf("the child said %q: %w", out.String(), err)
	}
	return got, nil
}
