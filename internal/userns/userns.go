// Package userns lets an ordinary user do what needs a mount: it runs the
// program again in a user namespace, where the user is root, and a mount
// namespace of its own.
//
// # Who runs where
//
// Most verbs need the namespaces only while they run: Run starts the program
// once more in new ones and waits. A mount must outlive the command, so a
// keeper, a process that does nothing, holds one pair of namespaces for each
// store root; while there is one, every verb runs in its namespaces and so sees
// the same mounts. The keeper goes when the last mount has gone.
//
// # Files of the keeper
//
//	ROOT/keeper/pid   the keeper's process id; flocked by it for its life
//	ROOT/keeper/use   flocked shared by each command inside, exclusively to stop
//
// A command takes `use` first and looks at `pid` then, so a keeper that it found
// alive cannot be stopped under it. Stopping takes `use` exclusively, counts
// the mounts and ends the keeper before it lets go.
//
// # Ids
//
// The user is mapped to root, and the ranges of /etc/subuid and /etc/subgid to
// 1 and up by newuidmap and newgidmap. Without them only the user's own id is
// mapped, and files of others cannot be made.
package userns

import (
	"os"
	"strconv"
	"strings"
	"syscall"
)

const (
	// envInside is set for everything that runs inside: "UID:GID" of the user as
	// seen outside.
	envInside = "LAYERCTL_USERNS"
	// envSync names the descriptor that says when the id maps are written.
	envSync = "_LAYERCTL_USERNS_SYNC"
	// envKeeper makes the program a keeper and is its directory.
	envKeeper = "_LAYERCTL_KEEPER"
)

// Init must be the first thing that main does. In a process that this package
// started it waits for the id maps, and never returns in a keeper.
func Init() {
	fd, err := strconv.Atoi(os.Getenv(envSync))
	if err != nil {
		return
	}
	os.Unsetenv(envSync)
	sync := os.NewFile(uintptr(fd), "sync")
	var b [1]byte
	if _, err := sync.Read(b[:]); err != nil {
		os.Exit(1) // the parent could not write the maps, and says why itself
	}
	sync.Close()
	if dir := os.Getenv(envKeeper); dir != "" {
		os.Exit(keep(dir))
	}
}

// Ordinary reports whether the program works for an ordinary user, outside the
// namespaces or inside.
func Ordinary() bool { return os.Geteuid() != 0 || Inside() }

// Needed reports whether this process has to enter namespaces to mount.
func Needed() bool { return os.Geteuid() != 0 && !Inside() }

// Inside reports whether this process runs in namespaces made by this package.
func Inside() bool {
	_, ok := outerIDs()
	return ok && !identityMap()
}

// outerIDs returns the user's ids outside.
func outerIDs() (ids [2]int, ok bool) {
	u, g, ok := strings.Cut(os.Getenv(envInside), ":")
	if !ok {
		return ids, false
	}
	uid, err1 := strconv.Atoi(u)
	gid, err2 := strconv.Atoi(g)
	return [2]int{uid, gid}, err1 == nil && err2 == nil
}

// identityMap reports whether this is the initial user namespace: the variable
// alone may have been carried out of ours, by sudo for one.
func identityMap() bool {
	b, err := os.ReadFile("/proc/self/uid_map")
	f := strings.Fields(string(b))
	return err == nil && len(f) == 3 && f[0] == "0" && f[1] == "0" && f[2] == "4294967295"
}

// environ is the environment of a program inside.
func environ(extra ...string) []string {
	env := append(syscall.Environ(), extra...)
	return append(env, envInside+"="+strconv.Itoa(os.Getuid())+":"+strconv.Itoa(os.Getgid()))
}
