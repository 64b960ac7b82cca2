package layer

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"maps"
	"path"
	"slices"
	"strings"
	"syscall"

	"github.com/layerctl/layerctl/internal/sys"
	"github.com/opencontainers/go-digest"
)

// Problem is one way in which a layer differs from its listing.
type Problem struct {
	Path string
	// What differs: one of the Problem constants.
	What string
	Want string // what the listing says; "" if it says nothing
	Got  string // what the layer has; "" if it has nothing
}

// What a Problem is about.
const (
	ProblemMissing  = "missing"            // the path is not there
	ProblemExists   = "exists"             // the path is there, and the layer deletes it
	ProblemUnlisted = "not in the listing" // the layer changes the path
	ProblemUnread   = "cannot be read"     // Got is the error
	// The rest is the names of aspects: "type", "content", "mode", "owner",
	// "time", "xattr", "rdev", "hardlink".
)

func (p *Problem) String() string {
	s := p.Path + ": " + p.What
	switch {
	case p.Want != "" && p.Got != "":
		s += fmt.Sprintf(": want %s, got %s", p.Want, p.Got)
	case p.Got != "":
		s += ": " + p.Got
	}
	return s
}

// VerifyOptions say how a layer is verified. The zero value reads everything.
type VerifyOptions struct {
	// Quick leaves the content of files unread.
	Quick bool
	// OverrideStat: see ReadOptions.
	OverrideStat bool
	// Progress, if not nil, is told the bytes of content read so far.
	Progress func(bytes int64)
}

// VerifyListing compares a layer with its listing and yields what differs, in
// path order. dir is the tree that is seen with the layer on top, and trusted;
// every record must be true of it. changes, if not nil, is what the layer's
// driver says that the layer changes; each must be in the listing, but for files
// that only lost names of theirs to a change that is. An error (of the listing,
// of changes, of the tree itself) ends the sequence; a file that cannot be read
// is a Problem.
func VerifyListing(ctx context.Context, dir string, listing iter.Seq2[ListingRecord, error], changes iter.Seq2[Change, error], o VerifyOptions) iter.Seq2[Problem, error] {
	return func(yield func(Problem, error) bool) {
		c, err := newChain(dir)
		if err != nil {
			yield(Problem{}, fmt.Errorf("layer: verify: %w", err))
			return
		}
		defer c.close()
		v := verifier{ctx: ctx, chain: c, o: o, yield: yield, buf: make([]byte, 128<<10)}
		if err := v.run(listing, changes); err != nil && err != errStop {
			yield(Problem{}, fmt.Errorf("layer: verify: %w", err))
		}
	}
}

type verifier struct {
	ctx   context.Context
	chain *chain // stands in the directory of the record before
	o     VerifyOptions
	yield func(Problem, error) bool
	buf   []byte
	read  int64
	// covering are the records above the current path below which the layer leaves
	// nothing of what was there.
	covering []string
}

func (v *verifier) run(listing iter.Seq2[ListingRecord, error], changes iter.Seq2[Change, error]) error {
	if changes == nil {
		changes = func(func(Change, error) bool) {}
	}
	next, stop := iter.Pull2(changes)
	defer stop()
	c, err, more := next()
	for r, rerr := range listing {
		if err := errors.Join(rerr, err, v.ctx.Err()); err != nil {
			return err
		}
		for more && ComparePaths(c.Entry.Path, r.Entry.Path) < 0 {
			if err := v.unlisted(&c); err != nil {
				return err
			}
			if c, err, more = next(); err != nil {
				return err
			}
		}
		v.cover(&r)
		if more && c.Entry.Path == r.Entry.Path {
			c, err, more = next()
		}
		if err := errors.Join(err, v.record(&r)); err != nil {
			return err
		}
	}
	for ; more; c, err, more = next() {
		if err := errors.Join(err, v.unlisted(&c)); err != nil {
			return err
		}
	}
	return nil
}

func (v *verifier) problem(path, what, want, got string) error {
	if !v.yield(Problem{path, what, want, got}, nil) {
		return errStop
	}
	return nil
}

// cover notes a record below which nothing of before is left.
func (v *verifier) cover(r *ListingRecord) {
	if r.Deleted || r.Replaced || !r.Entry.IsDir() {
		v.uncover(r.Entry.Path)
		v.covering = append(v.covering, r.Entry.Path)
	}
}

func (v *verifier) uncover(path string) {
	for n := len(v.covering); n > 0 && !liesBelow(path, v.covering[n-1]); n-- {
		v.covering = v.covering[:n-1]
	}
}

// unlisted judges a change that has no record.
func (v *verifier) unlisted(c *Change) error {
	v.uncover(c.Entry.Path)
	switch {
	case c.Kind == Deleted && len(v.covering) > 0:
		return nil
	case c.Kind == Modified && c.Aspects == AspectHardlink:
		return nil
	}
	return v.problem(c.Entry.Path, ProblemUnlisted, "", c.String())
}

// goTo makes the chain stand in the directory p. false: it is not there.
func (v *verifier) goTo(p string) (bool, error) {
	var want []string
	if p != "." {
		want = strings.Split(p, "/")
	}
	same := 0
	for same < len(want) && same < len(v.chain.names) && want[same] == v.chain.names[same] {
		same++
	}
	for len(v.chain.names) > same {
		v.chain.leave()
	}
	for _, name := range want[same:] {
		if err := v.chain.enter(name); err != nil {
			return false, notThereOr(err)
		}
	}
	return true, nil
}

func notThereOr(err error) error {
	if errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.ENOTDIR) || errors.Is(err, syscall.ELOOP) {
		return nil
	}
	return err
}

// record checks that a record is true.
func (v *verifier) record(r *ListingRecord) error {
	dir, name := path.Dir(r.Entry.Path), path.Base(r.Entry.Path)
	if r.Entry.Path == "." {
		name = ""
	}
	there, err := v.goTo(dir)
	if err != nil {
		return v.problem(r.Entry.Path, ProblemUnread, "", err.Error())
	}
	var st sys.Stat
	if there {
		fd, err := v.chain.fd()
		if err != nil {
			return err
		}
		if st, err = fd.Stat(name); err != nil {
			if notThereOr(err) != nil {
				return v.problem(r.Entry.Path, ProblemUnread, "", err.Error())
			}
			there = false
		}
	}
	switch {
	case r.Deleted && there:
		return v.problem(r.Entry.Path, ProblemExists, "", "")
	case r.Deleted:
		return nil
	case !there:
		return v.problem(r.Entry.Path, ProblemMissing, "", "")
	case r.Entry.Hardlink != "":
		return v.link(&r.Entry, &st)
	}
	return v.file(r, name, &st)
}

// link checks that two names are of one file.
func (v *verifier) link(e *Entry, st *sys.Stat) error {
	head, err := statBelow(v.chain.root, e.Hardlink)
	if err == nil && inodeOf(&head) == inodeOf(st) {
		return nil
	}
	if err != nil {
		return v.problem(e.Path, "hardlink", e.Hardlink, err.Error())
	}
	return v.problem(e.Path, "hardlink", e.Hardlink, "another file")
}

// file checks metadata, xattrs and content.
func (v *verifier) file(r *ListingRecord, name string, st *sys.Stat) error {
	fd, err := v.chain.fd()
	if err != nil {
		return err
	}
	got, err := entryOf(fd, name, st, ReadOptions{OverrideStat: v.o.OverrideStat})
	if err != nil {
		return v.problem(r.Entry.Path, ProblemUnread, "", err.Error())
	}
	if err := v.entry(&r.Entry, &got); err != nil {
		return err
	}
	if r.Entry.Type != TypeReg || got.Type != TypeReg || got.Size != r.Entry.Size || v.o.Quick {
		return nil
	}
	sum, err := v.digest(fd, &node{name: name, st: *st})
	switch {
	case v.ctx.Err() != nil:
		return v.ctx.Err()
	case err != nil:
		return v.problem(r.Entry.Path, ProblemUnread, "", err.Error())
	case sum != r.Digest:
		return v.problem(r.Entry.Path, "content", r.Digest.String(), sum.String())
	}
	return nil
}

// entry yields a Problem for each aspect that differs.
func (v *verifier) entry(want, got *Entry) error {
	for _, a := range [...]struct {
		what      string
		want, got string
	}{
		{"type", typeName(want.Type), typeName(got.Type)},
		{"mode", fmt.Sprintf("%04o", want.Mode), fmt.Sprintf("%04o", got.Mode)},
		{"owner", fmt.Sprintf("%d:%d", want.UID, want.GID), fmt.Sprintf("%d:%d", got.UID, got.GID)},
		{"time", want.ModTime.String(), got.ModTime.String()},
		{"rdev", fmt.Sprintf("%d:%d", want.Major, want.Minor), fmt.Sprintf("%d:%d", got.Major, got.Minor)},
		{"content", contentText(want), contentText(got)},
		{"xattr", xattrText(want.Xattrs), xattrText(got.Xattrs)},
	} {
		if a.want == a.got {
			continue
		}
		if err := v.problem(want.Path, a.what, a.want, a.got); err != nil {
			return err
		}
		if a.what == "type" {
			return nil
		}
	}
	return nil
}

// String prints the time as decimal seconds since 1970, with all nine digits.
func (t Timespec) String() string { return fmt.Sprintf("%d.%09d", t.Sec, t.Nsec) }

func contentText(e *Entry) string {
	switch e.Type {
	case TypeReg:
		return fmt.Sprintf("%d bytes", e.Size)
	case TypeSymlink:
		return fmt.Sprintf("link to %q", e.Linkname)
	}
	return ""
}

func xattrText(x map[string]string) string {
	var b []byte
	for _, n := range slices.Sorted(maps.Keys(x)) {
		if len(b) > 0 {
			b = append(b, ' ')
		}
		b = appendEscaped(b, n)
		b = append(b, '=')
		b = appendEscaped(b, x[n])
	}
	if len(b) == 0 {
		return "none"
	}
	return string(b)
}

func (v *verifier) digest(dir *sys.Fd, n *node) (digest.Digest, error) {
	f, err := openFile(dir, n)
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum, size, err := contentHash(v.ctx, f, v.buf)
	v.read += size
	if v.o.Progress != nil {
		v.o.Progress(v.read)
	}
	return sum, err
}
