package uniontest

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/layerctl/layerctl/internal/treegen"
)

// pair is the two sides, the kernel's first.
type pair struct {
	*differential
	sides     []*side
	longNames bool // see longRedirect
}

// each does something to both sides.
func (p *pair) each(f func(*side) error) error {
	for _, s := range p.sides {
		if err := f(s); err != nil {
			return fmt.Errorf("%s: %w", s.subject.Name, err)
		}
	}
	return nil
}

// end unmounts what a difference left mounted.
func (p *pair) end() {
	_ = p.each(func(s *side) error {
		if err := s.unmount(); err != nil {
			_ = sys.Umount(s.mnt, sys.MNT_DETACH)
			p.Errorf("unmount %s: %v", s.subject.Name, err)
		}
		return nil
	})
}

func (p *pair) mount() error { return p.each(func(s *side) error { return s.mount(p.Context()) }) }

func (p *pair) unmount() error { return p.each((*side).unmount) }

func (p *pair) run(ops []treegen.Op) error {
	if err := p.mount(); err != nil {
		return err
	}
	for i, o := range ops {
		p.ops++
		if err := p.step(o); err != nil {
			return fmt.Errorf("operation %d, %s: %w", i+1, o, err)
		}
	}
	if err := p.compare("in the end"); err != nil {
		return err
	}
	return p.swap()
}

// step does one operation on both sides.
func (p *pair) step(o treegen.Op) error {
	switch {
	case o.Verb == opRemount:
		if err := p.unmount(); err != nil {
			return err
		}
		return p.mount()
	case o.Verb == opDrop:
		return os.WriteFile("/proc/sys/vm/drop_caches", []byte("2"), 0)
	case p.avoided(o):
		return nil
	}
	var said []string
	for _, s := range p.sides {
		said = append(said, s.do(o))
	}
	if p.sides[1].subject.differs(TrueNumbers) != "" {
		said[0] = strings.ReplaceAll(said[0], untrueNumber, "")
	}
	if said[0] != said[1] && !p.lost(o, said[0], said[1]) {
		return fmt.Errorf("\n%10s: %s\n%10s: %s", p.sides[0].subject.Name, said[0], p.sides[1].subject.Name, said[1])
	}
	return nil
}

// links is a link count in an answer.
var links = regexp.MustCompile(` n=[0-9]+`)

// lost reports whether two answers differ only in what the kernel does with an
// open file of a lower whose name is gone or another file's: it shows the lower's
// link count, and cannot change attributes, since to copy the file up it wants the
// name. Then both sides close the file.
func (p *pair) lost(o treegen.Op, kernel, other string) bool {
	errno, _, _ := strings.Cut(kernel, " ")
	switch {
	case p.sides[1].subject.differs(LostNames) == "":
		return false
	case o.Verb == opFstat:
		return strings.Contains(other, " n=0 ") && links.ReplaceAllString(kernel, "") == links.ReplaceAllString(other, "")
	case o.Verb != opFchmod || !slices.Contains([]string{"EEXIST", "ENOENT", "ESTALE"}, errno):
		return false
	}
	for _, s := range p.sides {
		s.open[o.Slot].Close()
		delete(s.open, o.Slot)
	}
	return true
}

// avoided reports whether an operation would meet a named difference.
func (p *pair) avoided(o treegen.Op) bool {
	return p.setIDWrite(o) || p.failedRename(o) || p.longRedirect(o) || p.missingACL(o)
}

// missingACL reports whether an ACL would be taken away that a directory does not
// have, where it may be in the upper of one side alone, as the name of an indexed
// file comes there at once or later: overlayfs says ENODATA only of one in no upper.
func (p *pair) missingACL(o treegen.Op) bool {
	s := p.sides[0]
	if o.Verb != treegen.Rmxattr || !strings.HasPrefix(o.Attr, "system.posix_acl_") || !s.noLinks {
		return false
	}
	d, name, err := s.at(o.Path)
	if err != nil {
		return false
	}
	defer d.Close()
	st, err := d.Stat(name)
	if err != nil || !st.IsDir() {
		return false
	}
	_, err = d.Getxattr(name, o.Attr)
	return errors.Is(err, unix.ENODATA)
}

// longRedirect reports whether a metacopy file of several names would be moved or
// linked where a lower has it by a name that is too long for a redirect. The data of
// ours is found by the first of its names, the kernel's by the one that is moved;
// for either it may be too long, which is EXDEV.
func (p *pair) longRedirect(o treegen.Op) bool {
	s := p.sides[0]
	if !p.longNames || !s.noTimes || !s.noLinks { // metacopy=on, index=on
		return false
	}
	if !slices.Contains([]treegen.Verb{treegen.Rename, treegen.Link, treegen.Exchange, opNoRepl}, o.Verb) {
		return false
	}
	for _, path := range []string{o.Path, o.To} {
		if st, err := s.stat(path); err == nil && st.IsReg() && st.Nlink > 1 {
			return true
		}
	}
	return false
}

// hasLongNames reports whether a file of several names has one in the layers that is
// too long for a redirect.
func hasLongNames(layers []string) bool {
	const longest = 254 // redirects are to 255 bytes with a slash
	found := false
	for _, l := range layers {
		_ = filepath.WalkDir(l, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() && len(path)-len(l)-1 > longest {
				st, err := sys.LstatPath(path)
				found = found || err == nil && st.Nlink > 1
			}
			return nil
		})
	}
	return found
}

// failedRename reports whether a directory would be renamed onto one with names.
func (p *pair) failedRename(o treegen.Op) bool {
	if o.Verb != treegen.Rename || p.sides[1].subject.differs(FailedRenames) == "" {
		return false
	}
	s := p.sides[0]
	st, err := s.stat(o.Path)
	if err != nil || !st.IsDir() {
		return false
	}
	d, err := s.openDir(o.To)
	if err != nil {
		return false
	}
	defer d.Close()
	names, err := d.ReadDir()
	return err == nil && len(names) > 0
}

// setIDWrite reports whether a file with setuid or setgid bits would be written, or
// one mapped that has a capability.
func (p *pair) setIDWrite(o treegen.Op) bool {
	if p.sides[1].subject.differs(SetIDLater) == "" {
		return false
	}
	const setID = unix.S_ISUID | unix.S_ISGID
	slot := o.Slot
	switch o.Verb {
	case treegen.Write, treegen.Append:
		st, err := p.sides[0].stat(o.Path)
		return err == nil && st.Mode&setID != 0
	case opCopy:
		slot = o.Major
	case opPwrite, opMmap, opFalloc, opFtrunc:
	default:
		return false
	}
	f := p.sides[0].open[slot]
	if f == nil {
		return false
	}
	var st unix.Stat_t
	if unix.Fstat(fd(f), &st) == nil && st.Mode&setID != 0 {
		return true
	}
	// What had such a bit when it was opened is written by the server, what is mapped,
	// too, and that is a write like any other: it takes the capability.
	_, err := unix.Fgetxattr(fd(f), "security.capability", nil)
	return o.Verb == opMmap && err == nil
}

// compare compares the two trees as they are shown.
func (p *pair) compare(when string) error {
	var trees [2][]string
	for i, s := range p.sides {
		l := s.list
		l.noTimes = s.noTimes
		lines, err := l.list(s.mnt)
		if err != nil {
			return fmt.Errorf("list %s: %w", s.subject.Name, err)
		}
		trees[i] = lines
	}
	if d := difference(trees[0], trees[1]); d != "" {
		return fmt.Errorf("%s %s (+) shows otherwise than %s (-):\n%s", when, p.sides[1].subject.Name, p.sides[0].subject.Name, d)
	}
	return nil
}

// swap mounts each upper again, then by the other: both must show the same still.
func (p *pair) swap() error {
	for i, when := range []string{"mounted again", "each mounted by the other"} {
		if err := p.unmount(); err != nil {
			return err
		}
		if i == 1 {
			a, b := p.sides[0], p.sides[1]
			a.subject, b.subject = b.subject, a.subject
		}
		if err := p.mount(); err != nil {
			return fmt.Errorf("%s: %w", when, err)
		}
		if err := p.compare(when); err != nil {
			return err
		}
	}
	return nil
}
