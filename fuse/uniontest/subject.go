package uniontest

import (
	"context"
	"slices"
	"strings"
)

// Spec says what is to be mounted. Paths are absolute.
type Spec struct {
	Lowers []string // nearest first
	Data   []string // data-only lowers
	Upper  string   // "" for a read-only union
	Work   string
	// LowerDir, if not empty, is the option lowerdir= as it is to be given, and
	// Lowers and Data only say which directories are in it.
	LowerDir string
	// Options are options in the kernel's words: "index=on", "userxattr",
	// "volatile", "ro".
	Options []string
}

// option returns the value of the option key: "" if it is not there, "on" for
// one without value.
func (s Spec) option(key string) string {
	for _, o := range slices.Backward(s.Options) {
		k, v, ok := strings.Cut(o, "=")
		switch {
		case k == key && ok:
			return v
		case k == key:
			return "on"
		}
	}
	return ""
}

// with returns s with further options.
func (s Spec) with(options ...string) Spec {
	s.Options = append(slices.Clone(s.Options), options...)
	return s
}

// Subject is an implementation of unions: what the cases run on.
type Subject struct {
	Name string
	// Kernel says that it is the kernel's overlayfs.
	Kernel bool
	// Mount mounts s at target.
	Mount func(ctx context.Context, s Spec, target string) (Mounted, error)
	// Differences are what the subject does otherwise than the kernel, each with
	// its reason.
	Differences map[Difference]string
	// Defects are cases that fail, by FS/GROUP/CASE as subtests are named, each
	// with what is wrong. They are left out and counted.
	Defects map[string]string
}

// Mounted is one mounted union.
type Mounted interface {
	// Unmount unmounts, and returns when nothing of it runs any more.
	Unmount() error
	// Kill ends a server with SIGKILL, its mount staying behind dead, and reports
	// whether there was one to kill.
	Kill() bool
}

// Difference is something that a Subject may do otherwise than the kernel.
type Difference string

// The differences that a Subject may have.
const (
	// NoClone: FICLONE and FICLONERANGE answer EOPNOTSUPP, or ENOTTY.
	NoClone Difference = "FICLONE"
	// NoShift: FALLOC_FL_COLLAPSE_RANGE and FALLOC_FL_INSERT_RANGE answer
	// EOPNOTSUPP.
	NoShift Difference = "fallocate that shifts"
	// InUseRefused: an upper or workdir in use by another mount is refused with
	// index=off, too, where the kernel only warns.
	InUseRefused Difference = "in use"
	// KeepsTimes: the first open for writing of a metacopy file, which brings its
	// data, leaves its mtime.
	KeepsTimes Difference = "times of metacopy files"
	// LinksLater: with index=on, changing a file by one of its names puts that name
	// into the upper only if it is the first of them, or is unlinked or renamed.
	LinksLater Difference = "names of indexed files"
	// NoRepair: an upper directory made by hand that lacks xattr origin does not
	// get it by being looked at.
	NoRepair Difference = "missing origins"
	// UserRedirects: redirects and metacopy work with userxattr.
	UserRedirects Difference = "userxattr"
	// SetIDLater: setuid and setgid bits that a file gets while it is open go at a
	// write by root, too.
	SetIDLater Difference = "setuid bits of open files"
	// LostNames: fchmod, fchown and the like work on an open file of a lower whose
	// name was removed or is another file's by now, and fstat shows no link.
	LostNames Difference = "open files without names"
	// FailedRenames: a rename onto a directory that is not empty leaves everything
	// as it was.
	FailedRenames Difference = "renames that fail"
	// TrueNumbers: d_ino is st_ino for every name, whatever was listed before.
	TrueNumbers Difference = "numbers in a list"
	// StrayWhiteouts: a file with xattr whiteout in a directory that is not marked
	// for such is a file like any other.
	StrayWhiteouts Difference = "stray whiteouts"
)

// differs returns the reason for a difference, "" if the subject has it not.
func (s *Subject) differs(d Difference) string { return s.Differences[d] }
