package main

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
)

func printHeader() {
	fmt.Println("| workload | subject | wall s, median (min..max) | CPU s, client + server | CPU beside the kernel's | more |")
	fmt.Println("|---|---|---|---|---|---|")
}

// printTable prints a workload's lines: what each subject took, and its CPU time
// beside the kernel's overlayfs.
func printTable(w workload, all []*figures) {
	for _, f := range all {
		if len(f.Runs) == 0 {
			fmt.Printf("| %s | %s | %s | | | |\n", f.Workload, f.Subject, f.Missing)
			continue
		}
		cpu := f.each(func(r run) float64 { return (r.ClientMS + r.ServerMS) / 1e3 })
		fmt.Printf("| %s | %s | %s | %s = %s + %s | %s | %s |\n", f.Workload, f.Subject,
			spread(f.each(func(r run) float64 { return r.WallMS / 1e3 }), 3), spread(cpu, 2),
			number(median(f.each(func(r run) float64 { return r.ClientMS / 1e3 })), 2),
			number(median(f.each(func(r run) float64 { return r.ServerMS / 1e3 })), 2),
			besideKernel(all, f), f.more(w))
	}
}

// besideKernel is the median of the ratios run by run: the runs are interleaved, so
// that what else the machine did is in both.
func besideKernel(all []*figures, f *figures) string {
	for _, k := range all {
		if strings.TrimPrefix(k.Subject, rootlessPrefix) != "kernel" || len(k.Runs) != len(f.Runs) {
			continue
		}
		var ratios []float64
		for i, r := range f.Runs {
			if c := k.Runs[i].ClientMS + k.Runs[i].ServerMS; c > 0 {
				ratios = append(ratios, (r.ClientMS+r.ServerMS)/c)
			}
		}
		if len(ratios) > 0 {
			return number(median(ratios), 2)
		}
	}
	return ""
}

func (f *figures) each(of func(run) float64) []float64 {
	var v []float64
	for _, r := range f.Runs {
		v = append(v, of(r))
	}
	return v
}

func (f *figures) more(w workload) string {
	var s []string
	if w.mib > 0 {
		s = append(s, "CPU ms/MiB "+number(median(f.each(func(r run) float64 { return (r.ClientMS + r.ServerMS) / w.mib })), 2))
	}
	for _, k := range slices.Sorted(maps.Keys(f.Runs[0].Own)) {
		s = append(s, k+" "+number(median(f.each(func(r run) float64 { return r.Own[k] })), 1))
	}
	return strings.Join(s, "; ")
}

func median(v []float64) float64 {
	s := slices.Sorted(slices.Values(v))
	return s[len(s)/2]
}

func spread(v []float64, digits int) string {
	return fmt.Sprintf("%s (%s..%s)", number(median(v), digits), number(slices.Min(v), digits), number(slices.Max(v), digits))
}

func number(x float64, digits int) string { return strconv.FormatFloat(x, 'f', digits, 64) }
