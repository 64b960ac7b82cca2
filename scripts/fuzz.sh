#!/bin/sh
# fuzz.sh TIME: runs every fuzz target of the module for TIME.
set -eu
time=${1:?usage: fuzz.sh TIME}
go list -f '{{if or .TestGoFiles .XTestGoFiles}}{{.ImportPath}} {{.Dir}}{{end}}' ./... |
	while read -r pkg dir; do
		for target in $(cat "$dir"/*_test.go | sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p'); do
			echo "fuzz: $pkg $target"
			go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 5x -parallel 2 "$pkg" >/tmp/fuzz.$$ 2>&1 ||
				{ # the end of the time, met in the middle of an input, is no finding
					if grep -q 'context deadline exceeded' /tmp/fuzz.$$ && ! grep -q 'Failing input written' /tmp/fuzz.$$; then
						rm -f /tmp/fuzz.$$
						continue
					fi
					cat /tmp/fuzz.$$; rm -f /tmp/fuzz.$$; exit 1; }
			rm -f /tmp/fuzz.$$
		done
	done
