package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// figures is what the runs of one subject cost.
type figures struct {
	Workload string
	Subject  string
	Missing  string             `json:",omitempty"`
	WallMS   []float64          // one per run
	CPUMS    []float64          // user and system
	PeakMiB  []float64          // largest resident set
	Own      map[string]samples `json:",omitempty"` // figures the subject printed, microseconds
}

type samples []float64

func measure(w workload, dir string) (_ []figures, err error) {
	dir = filepath.Join(dir, w.name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	if w.fixture != nil {
		if err := w.fixture(dir); err != nil {
			return nil, fmt.Errorf("fixture: %w", err)
		}
	}
	if w.done != nil {
		defer func() { err = errors.Join(err, w.done(dir)) }()
	}
	all := make([]figures, len(w.subjects))
	for i, s := range w.subjects {
		all[i] = figures{Workload: w.name, Subject: s.name, Own: map[string]samples{}}
		if s.missing != nil {
			all[i].Missing = s.missing()
		}
	}
	for r := range *runs + 1 {
		for i, s := range w.subjects {
			if all[i].Missing != "" {
				continue
			}
			if err := once(w, s, dir, &all[i], r > 0); err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
		}
	}
	return all, nil
}

func once(w workload, s subject, dir string, f *figures, counted bool) error {
	if s.before != nil {
		if err := s.before(dir); err != nil {
			return fmt.Errorf("before: %w", err)
		}
	}
	var out, stderr bytes.Buffer
	cmd := exec.Command("/proc/self/exe", append(os.Args[1:], "-child", w.name+"/"+s.name, "-dir", dir)...)
	cmd.Stdout, cmd.Stderr = &out, &stderr
	start := time.Now()
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%w: %s", err, stderr.String())
	}
	wall := time.Since(start)
	if counted {
		// The child waits for what it forks, so its children are in Rusage.
		ru := cmd.ProcessState.SysUsage().(*syscall.Rusage)
		f.WallMS = append(f.WallMS, float64(wall.Microseconds())/1e3)
		f.CPUMS = append(f.CPUMS, float64((cmd.ProcessState.UserTime()+cmd.ProcessState.SystemTime()).Microseconds())/1e3)
		f.PeakMiB = append(f.PeakMiB, float64(ru.Maxrss)/1024)
		for sc := bufio.NewScanner(&out); sc.Scan(); {
			if k, v, ok := strings.Cut(sc.Text(), "="); ok {
				if n, err := strconv.ParseFloat(v, 64); err == nil {
					f.Own[k] = append(f.Own[k], n)
				}
			}
		}
	}
	if s.after != nil {
		if err := s.after(dir); err != nil {
			return fmt.Errorf("after: %w", err)
		}
	}
	return nil
}

// own prints a figure of the child's own, measured inside the process.
func own(key string, d time.Duration) { fmt.Printf("%s=%d\n", key, d.Microseconds()) }

func printTable(w workload, all []figures) {
	fmt.Printf("\n## %s\n\n%s\n\n", w.name, w.about)
	fmt.Println("| subject | wall ms, median (min..max) | CPU ms | peak MiB | measured inside, us |")
	fmt.Println("|---|---|---|---|---|")
	for _, f := range all {
		if f.Missing != "" {
			fmt.Printf("| %s | absent: %s | | | |\n", f.Subject, f.Missing)
			continue
		}
		var inside []string
		for k, v := range f.Own {
			inside = append(inside, fmt.Sprintf("%s %s", k, spread(v, 0)))
		}
		slices.Sort(inside)
		fmt.Printf("| %s | %s | %s | %s | %s |\n", f.Subject, spread(f.WallMS, 1), spread(f.CPUMS, 1), spread(f.PeakMiB, 0), strings.Join(inside, "; "))
	}
}

func spread(v []float64, digits int) string {
	s := slices.Clone(v)
	slices.Sort(s)
	if len(s) == 0 {
		return "-"
	}
	n := func(x float64) string { return strconv.FormatFloat(x, 'f', digits, 64) }
	return fmt.Sprintf("%s (%s..%s)", n(s[len(s)/2]), n(s[0]), n(s[len(s)-1]))
}
