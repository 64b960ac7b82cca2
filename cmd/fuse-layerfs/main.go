// Command fuse-layerfs mounts a union of directories, as the kernel's overlayfs
// does, through FUSE. Its command line is fuse-overlayfs's.
package main

import (
	"fmt"
	"io"
	"os"
)

// version is set by the linker.
var version = "unknown"

const name = "fuse-layerfs"

func main() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) }

// run is the program without the process; it returns the exit status.
func run(args []string, stdout, stderr io.Writer) int {
	c, err := parseCommandLine(args)
	switch {
	case err != nil:
	case c.version:
		fmt.Fprintf(stdout, "%s: version %s\n", name, version)
		return 0
	case c.help:
		fmt.Fprint(stdout, help)
		return 0
	case c.options.remount:
		err = remount(&c)
		if err == nil {
			return 0
		}
	default:
		err = c.options.check()
	}
	if err != nil {
		fmt.Fprintf(stderr, "%s: %v\n", name, err)
		return 1
	}
	ready, child := readyPipe()
	if !child {
		for _, w := range c.warnings {
			fmt.Fprintf(stderr, "%s: %s\n", name, w)
		}
	}
	if !c.foreground && !child {
		err = daemonize(args, &c)
	} else {
		err = serve(&c, stderr, ready)
	}
	if err == nil {
		return 0
	}
	if child && ready.tell(err.Error()) {
		return 1
	}
	fmt.Fprintf(stderr, "%s: %v\n", name, err)
	return 1
}
