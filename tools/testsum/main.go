// Command testsum reads `go test -json` from standard input and prints what a
// person wants of it: the output of failed tests, a line a package, the passed
// and skipped cases a driver, skips by reason, and the count. It fails when a
// test failed or a driver passed fewer cases than its floor.
//
//	go test -json ./... | testsum [-floors FILE]
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// event is a line of `go test -json` (cmd/test2json).
type event struct {
	Action  string
	Package string
	Test    string
	Output  string
	Elapsed float64
}

type summary struct {
	count   map[string]int      // by action: pass, fail, skip
	output  map[string][]string // by package and test, until it ends
	drivers map[string]int      // passed cases, by "DRIVER FS"
	took    []took              // packages, as they ended
	bad     bool
}

// took is how long a package's tests ran, in seconds of wall time.
type took struct {
	pkg     string
	seconds float64
}

// slowest is how many packages are named in the end.
const slowest = 8

// driverLine is what drivertest prints.
var driverLine = regexp.MustCompile(`^drivertest: (\S+) on (\S+): (\d+) passed`)

func main() {
	floors := flag.String("floors", "", "hold the cases passed per driver against this file")
	flag.Parse()
	s := &summary{count: map[string]int{}, output: map[string][]string{}, drivers: map[string]int{}}
	in := bufio.NewScanner(os.Stdin)
	in.Buffer(nil, 16<<20)
	for in.Scan() {
		var e event
		if err := json.Unmarshal(in.Bytes(), &e); err != nil { // what is not JSON is a build's words
			fmt.Println(in.Text())
			continue
		}
		s.take(e)
	}
	if *floors != "" {
		s.hold(*floors)
	}
	s.sayTook()
	fmt.Printf("%d passed, %d failed, %d skipped\n", s.count["pass"], s.count["fail"], s.count["skip"])
	if s.bad || s.count["fail"] > 0 || s.count["pass"] == 0 {
		os.Exit(1)
	}
}

func (s *summary) take(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output", "build-output":
		s.output[key] = append(s.output[key], e.Output)
		s.show(e.Output)
	case "build-fail":
		s.bad = true
		fmt.Print(strings.Join(s.output[key], ""))
	case "pass", "fail", "skip":
		if e.Test != "" {
			s.count[e.Action]++
		} else {
			s.endPackage(e)
		}
		if e.Action == "fail" {
			s.bad = true
			fmt.Print(strings.Join(s.output[key], ""))
		}
		delete(s.output, key)
	}
}

// show prints at once what is of interest from every test, passed or not.
func (s *summary) show(line string) {
	if m := driverLine.FindStringSubmatch(line); m != nil {
		s.drivers[m[1]+" "+m[2]], _ = strconv.Atoi(m[3])
	}
	for _, prefix := range []string{"drivertest: ", "testenv: "} {
		if strings.HasPrefix(line, prefix) {
			fmt.Print(line)
		}
	}
}

func (s *summary) endPackage(e event) {
	if e.Action != "skip" { // skip: no test files
		s.took = append(s.took, took{e.Package, e.Elapsed})
		fmt.Printf("%s\t%s\t%.1fs\n", map[string]string{"pass": "ok", "fail": "FAIL"}[e.Action], e.Package, e.Elapsed)
	}
}

// sayTook names the packages that took longest, which is where a run that has to
// be shorter is made so.
func (s *summary) sayTook() {
	slices.SortFunc(s.took, func(a, b took) int { return cmp.Compare(b.seconds, a.seconds) })
	for _, t := range s.took[:min(slowest, len(s.took))] {
		fmt.Printf("took: %7.1fs %s\n", t.seconds, t.pkg)
	}
}

// hold compares the drivers that ran with their floors, lines of "DRIVER FS
// CASES". A run of no driver at all is not judged.
func (s *summary) hold(file string) {
	b, err := os.ReadFile(file)
	if err != nil {
		fmt.Println("floors:", err)
		s.bad = true
		return
	}
	floors := map[string]int{}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[0] != "#" {
			floors[f[0]+" "+f[1]], _ = strconv.Atoi(f[2])
		}
	}
	if len(s.drivers) == 0 {
		return
	}
	for _, d := range slices.Sorted(maps.Keys(floors)) {
		if s.drivers[d] < floors[d] {
			fmt.Printf("floors: %s: %d passed, at least %d expected\n", d, s.drivers[d], floors[d])
			s.bad = true
		}
	}
}
