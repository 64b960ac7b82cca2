// Package treegen makes random file trees and random changes of them, for tests
// that compare two implementations of the same tree.
//
// An Op is one operation on one tree: plain data, printed by String and read
// back by Parse, so that a failing list can be kept as a test. A Gen draws Ops
// from a Source (a *math/rand/v2.Rand, or a property-test library's draws), and
// keeps a rough model of which names exist, so that most operations hit
// something. A Tree applies them to a directory and returns each one's errno, so
// that two sides can be compared operation by operation. Shrink finds a short
// list that still fails.
//
// Trees are repeatable: contents come from a seed in the Op, and every mtime
// that the kernel would have set to the current time is set to the Op's Time
// afterwards. The same list applied to two directories of file systems that can
// hold it gives equal trees, nanoseconds included.
//
// Traps: a list may use names of 255 bytes and bytes that are not UTF-8; ACLs
// and capabilities follow the kernel's rules (a chown drops a capability, a chmod
// changes an ACL); nothing follows a symlink, in the middle of a path either.
package treegen

import (
	"fmt"
	"strconv"
	"strings"
)

// Verb is what an Op does.
type Verb string

// The verbs. Those that are not a single system call say so.
const (
	Create   Verb = "create"   // a new regular file: path, mode, size, seed; EEXIST if the name is there
	Write    Verb = "write"    // size bytes of seed at off
	Append   Verb = "append"   // size bytes of seed at the end
	Truncate Verb = "truncate" // to size bytes
	Rewrite  Verb = "rewrite"  // size bytes of seed at off within the file, its mtime put back: only the bytes differ
	Retouch  Verb = "retouch"  // opens for writing, writes the first byte back, mtime put back: nothing differs
	Replace  Verb = "replace"  // a new file beside it, renamed over path
	Chmod    Verb = "chmod"    // mode; ELOOP on a symlink
	Chown    Verb = "chown"    // uid, gid; of a symlink itself
	Utimes   Verb = "utimes"   // mtime becomes time; of a symlink itself
	Setxattr Verb = "setxattr" // attr, value
	Rmxattr  Verb = "rmxattr"  // attr
	Mkdir    Verb = "mkdir"    // mode
	Rmdir    Verb = "rmdir"
	Symlink  Verb = "symlink" // at path, its target to
	Mknod    Verb = "mknod"   // mode holds the type: fifo, socket, character or block device
	Link     Verb = "link"    // to becomes another name of path
	Rename   Verb = "rename"  // path to to, replacing as rename(2) does
	Exchange Verb = "exchange"
	Unlink   Verb = "unlink"
	RmTree   Verb = "rmtree"   // removes path and all below it
	Recreate Verb = "recreate" // a directory removed with all in it and made again, empty, with mode
)

// Op is one operation. Fields that its verb does not use are zero.
type Op struct {
	Verb  Verb
	Path  string // relative to the root of the tree, clean
	To    string // second path, or a symlink's target
	Mode  uint32 // permission bits; for Mknod also the type
	UID   uint32
	GID   uint32
	Off   int64
	Size  int64
	Seed  uint64 // of content; 0 is zero bytes
	Major uint32
	Minor uint32
	Attr  string
	Value string
	Sec   int64 // the time that what the Op touches gets
	Nsec  uint32
	Slot  uint32 // for verbs of others that work on open files: which
}

// String prints the Op on one line that Parse reads.
func (o Op) String() string {
	var b strings.Builder
	b.WriteString(string(o.Verb))
	text := func(k, v string) {
		if v != "" {
			fmt.Fprintf(&b, " %s=%s", k, strconv.QuoteToASCII(v))
		}
	}
	num := func(k string, v int64) {
		if v != 0 {
			fmt.Fprintf(&b, " %s=%d", k, v)
		}
	}
	text("path", o.Path)
	text("to", o.To)
	if o.Mode != 0 {
		fmt.Fprintf(&b, " mode=%#o", o.Mode)
	}
	num("uid", int64(o.UID))
	num("gid", int64(o.GID))
	num("off", o.Off)
	num("size", o.Size)
	if o.Seed != 0 {
		fmt.Fprintf(&b, " seed=%d", o.Seed)
	}
	num("major", int64(o.Major))
	num("minor", int64(o.Minor))
	text("attr", o.Attr)
	text("value", o.Value)
	num("sec", o.Sec)
	num("nsec", int64(o.Nsec))
	num("slot", int64(o.Slot))
	return b.String()
}

// Format prints a list, one Op a line.
func Format(ops []Op) string {
	var b strings.Builder
	for _, o := range ops {
		b.WriteString(o.String())
		b.WriteByte('\n')
	}
	return b.String()
}

// Parse reads a list that Format printed. Empty lines and lines that begin with
// # are left out.
func Parse(text string) ([]Op, error) {
	var ops []Op
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		o, err := parseOp(line)
		if err != nil {
			return nil, fmt.Errorf("treegen: line %d: %w", i+1, err)
		}
		ops = append(ops, o)
	}
	return ops, nil
}

func parseOp(line string) (Op, error) {
	verb, rest, _ := strings.Cut(line, " ")
	o := Op{Verb: Verb(verb)}
	for rest = strings.TrimSpace(rest); rest != ""; rest = strings.TrimSpace(rest) {
		key, after, ok := strings.Cut(rest, "=")
		if !ok {
			return o, fmt.Errorf("no value in %q", rest)
		}
		var value string
		if strings.HasPrefix(after, `"`) {
			q, err := strconv.QuotedPrefix(after)
			if err != nil {
				return o, fmt.Errorf("%s: %w", key, err)
			}
			value, _ = strconv.Unquote(q)
			rest = after[len(q):]
		} else {
			value, rest, _ = strings.Cut(after, " ")
		}
		if err := o.set(key, value); err != nil {
			return o, err
		}
	}
	return o, nil
}

func (o *Op) set(key, value string) error {
	texts := map[string]*string{"path": &o.Path, "to": &o.To, "attr": &o.Attr, "value": &o.Value}
	if p := texts[key]; p != nil {
		*p = value
		return nil
	}
	small := map[string]*uint32{"mode": &o.Mode, "uid": &o.UID, "gid": &o.GID, "major": &o.Major, "minor": &o.Minor, "nsec": &o.Nsec, "slot": &o.Slot}
	if p := small[key]; p != nil {
		n, err := strconv.ParseUint(value, 0, 32)
		*p = uint32(n)
		return err
	}
	large := map[string]*int64{"off": &o.Off, "size": &o.Size, "sec": &o.Sec}
	if p := large[key]; p != nil {
		n, err := strconv.ParseInt(value, 0, 64)
		*p = n
		return err
	}
	if key == "seed" {
		n, err := strconv.ParseUint(value, 0, 64)
		o.Seed = n
		return err
	}
	return fmt.Errorf("unknown key %q", key)
}

// Shrink returns a short list that still fails: it takes away ever smaller runs
// of Ops as long as fails says true of what is left. fails must start from a
// fresh tree each time; it is called at most limit times.
func Shrink(ops []Op, limit int, fails func([]Op) bool) []Op {
	for size := len(ops) / 2; size > 0 && limit > 0; {
		removed := false
		for at := 0; at+size <= len(ops) && limit > 0; limit-- {
			try := append(append([]Op(nil), ops[:at]...), ops[at+size:]...)
			if fails(try) {
				ops, removed = try, true
			} else {
				at += size
			}
		}
		if !removed || size > len(ops) {
			size = min(size/2, len(ops)/2)
		}
	}
	return ops
}
