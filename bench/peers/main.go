// Command peers measures layerctl beside its peers: every subject of a workload
// runs as a child process of its own, in turn (A B C A B C ...), on a file
// system made for the run, and is charged wall time, CPU time and peak memory by
// the operating system's own accounting.
//
// It is a module of its own so that containerd's plugins weigh on nothing else.
//
//	go run . [-runs N] [-workload NAME,...] [-tar FILE] [-json]
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"slices"
	"strings"
)

// workload is one thing to be measured and everybody who can do it.
type workload struct {
	name  string
	about string
	// fixture makes what all subjects share, once, in dir.
	fixture  func(dir string) error
	subjects []subject
	// done, if not nil, undoes what fixture mounted.
	done func(dir string) error
}

// subject does the workload's work once.
type subject struct {
	name string
	// before and after run untimed, in the parent, around each run.
	before, after func(dir string) error
	// run is timed, in a child process of its own; it may print "key=value"
	// figures of its own (microseconds within the process) on stdout.
	run func(dir string) error
	// missing says why the subject cannot run here; "" if it can.
	missing func() string
}

var workloads = []workload{applyWorkload, diffWorkload, usageWorkload, prepareWorkload, startWorkload, btrfsWorkload, btrfsLargeWorkload, btrfsQuota("simple"), btrfsQuota("qgroups")}

var (
	runs     = flag.Int("runs", 5, "counted runs of each subject, after one that warms up")
	only     = flag.String("workload", "", "comma-separated workloads; empty means all")
	tarFile  = flag.String("tar", "", "the layer that apply unpacks; empty means the Go toolchain's tree")
	fsSize   = flag.String("size", "6G", "size of the scratch file system, a loop file on /dev/shm")
	asJSON   = flag.Bool("json", false, "print the figures as JSON")
	program  = flag.String("layerctl", "../../bin/layerctl", "the program that the start workload starts")
	childJob = flag.String("child", "", "internal: WORKLOAD/SUBJECT to run once in -dir")
	childDir = flag.String("dir", "", "internal: the child's scratch directory")
)

func main() {
	flag.Parse()
	if err := realMain(); err != nil {
		fmt.Fprintln(os.Stderr, "peers:", err)
		os.Exit(1)
	}
}

func realMain() error {
	if *childJob != "" {
		return runChild(*childJob, *childDir)
	}
	if again, err := inPrivateNamespace(); !again {
		return err
	}
	dir, done, err := scratch(*fsSize)
	if err != nil {
		return err
	}
	defer done()
	var all []figures
	for _, w := range workloads {
		if *only != "" && !slices.Contains(strings.Split(*only, ","), w.name) {
			continue
		}
		f, err := measure(w, dir)
		if err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
		all = append(all, f...)
		if !*asJSON {
			printTable(w, f)
		}
	}
	if *asJSON {
		return json.NewEncoder(os.Stdout).Encode(all)
	}
	return nil
}

func find(job string) (workload, subject, error) {
	wn, sn, _ := strings.Cut(job, "/")
	for _, w := range workloads {
		for _, s := range w.subjects {
			if w.name == wn && s.name == sn {
				return w, s, nil
			}
		}
	}
	return workload{}, subject{}, fmt.Errorf("no subject %q", job)
}

func runChild(job, dir string) error {
	_, s, err := find(job)
	if err != nil {
		return err
	}
	return s.run(dir)
}
