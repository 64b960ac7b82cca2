package drivers

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"pgregory.net/rapid"

	"github.com/layerctl/layerctl/internal/kprobe"
)

func TestParseIDIsTheInverseOfString(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		id := ID(rapid.Uint64Range(1, math.MaxUint64).Draw(t, "id"))
		if got, ok := ParseID(id.String()); !ok || got != id {
			t.Fatalf("ParseID(%q) = %d, %v", id.String(), got, ok)
		}
	})
}

func TestParseIDRefusesOtherSpellings(t *testing.T) {
	for _, s := range []string{"", "0", "00", "01", "A", "+1", "-1", "1 ", "1.new", "new", ".", "3w5e11264sgsg", "zzzzzzzzzzzzzzzz"} {
		id, ok := ParseID(s)
		if ok && id.String() != s {
			t.Errorf("ParseID(%q) = %s", s, id)
		}
		if s != "new" && ok {
			t.Errorf("ParseID(%q) accepted as %d", s, id)
		}
	}
}

func TestParseIDTakesAnyString(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		s := rapid.String().Draw(t, "s")
		if id, ok := ParseID(s); ok && id.String() != s {
			t.Fatalf("ParseID(%q) = %s", s, id)
		}
	})
}

func TestWrapKeepsSentinelAndErrno(t *testing.T) {
	for _, c := range []struct{ err, want error }{
		{&os.PathError{Op: "open", Path: "x", Err: syscall.ENOENT}, errdefs.ErrNotFound},
		{&os.PathError{Op: "mkdir", Path: "x", Err: syscall.EEXIST}, errdefs.ErrAlreadyExists},
		{syscall.ENOSPC, errdefs.ErrResourceExhausted},
		{syscall.EDQUOT, errdefs.ErrResourceExhausted},
		{syscall.EPERM, errdefs.ErrPermissionDenied},
		{syscall.EBUSY, errdefs.ErrFailedPrecondition},
		{syscall.EROFS, errdefs.ErrFailedPrecondition},
		{syscall.EIO, errdefs.ErrDataLoss},
		{syscall.EOPNOTSUPP, errdefs.ErrNotImplemented},
		{syscall.EINVAL, errdefs.ErrInvalidArgument},
		{syscall.ENOTTY, errdefs.ErrInternal},
		{errors.New("odd"), errdefs.ErrInternal},
		{context.Canceled, context.Canceled},
		{fmt.Errorf("parent 2: %w: %w", errdefs.ErrFailedPrecondition, syscall.ENOENT), errdefs.ErrFailedPrecondition},
	} {
		err := Wrap("native", "create", 46, c.err)
		if !errors.Is(err, c.want) {
			t.Errorf("Wrap(%v) wraps not %v", c.err, c.want)
		}
		if c.want != errdefs.ErrNotFound && errdefs.IsNotFound(err) {
			t.Errorf("Wrap(%v) is not found, too", c.err)
		}
		var before, after syscall.Errno
		if errors.As(c.err, &before) && (!errors.As(err, &after) || before != after) {
			t.Errorf("Wrap(%v) has errno %v", c.err, after)
		}
		if !strings.HasPrefix(err.Error(), "native: create 1a: ") {
			t.Errorf("%q", err)
		}
	}
	if Wrap("native", "create", 1, nil) != nil {
		t.Error("Wrap of nil")
	}
}

func factory(name string, works kprobe.Answer) Factory {
	return Factory{Name: name, Probe: func(context.Context, string) Probe {
		return Probe{Works: works, Reason: "because of " + name}
	}}
}

func TestBestIsTheFirstThatWorks(t *testing.T) {
	r := NewRegistry(factory("a", kprobe.No), factory("b", kprobe.Unknown), factory("c", kprobe.Yes), factory("d", kprobe.Yes))
	c, err := r.Best(t.Context(), t.TempDir())
	if err != nil || c.Factory.Name != "c" {
		t.Fatalf("Best: %s, %v", c.Factory.Name, err)
	}
	if len(c.Passed) != 2 || c.Passed["a"].Reason != "because of a" || c.Passed["b"].Works != kprobe.Unknown {
		t.Errorf("passed over: %+v", c.Passed)
	}
}

func TestBestOfNoneSaysWhy(t *testing.T) {
	r := NewRegistry(factory("a", kprobe.No), factory("b", kprobe.Unknown))
	_, err := r.Best(t.Context(), t.TempDir())
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "because of a") || !strings.Contains(err.Error(), "because of b") {
		t.Errorf("Best: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := r.Best(ctx, t.TempDir()); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestLookupNamesWhatThereIs(t *testing.T) {
	r := NewRegistry(factory("a", kprobe.Yes), factory("b", kprobe.Yes))
	if f, err := r.Lookup("b"); err != nil || f.Name != "b" {
		t.Errorf("Lookup(b): %s, %v", f.Name, err)
	}
	_, err := r.Lookup("c")
	if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "a, b") {
		t.Errorf("Lookup(c): %v", err)
	}
	if fs := r.Factories(); len(fs) != 2 || fs[0].Name != "a" {
		t.Errorf("Factories: %v", fs)
	}
}

func TestTwoFactoriesOfOneNamePanic(t *testing.T) {
	defer func() {
		if recover() == nil {
			t.Error("no panic")
		}
	}()
	NewRegistry(factory("a", kprobe.Yes), factory("a", kprobe.Yes))
}

func TestCheckOptionsNamesTheUnknown(t *testing.T) {
	known := []Option{{Name: "x"}, {Name: "y"}}
	if err := CheckOptions(known, map[string]string{"y": "1"}); err != nil {
		t.Error(err)
	}
	err := CheckOptions(known, map[string]string{"x": "1", "z": "1"})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `"z"`) || !strings.Contains(err.Error(), "x, y") {
		t.Errorf("CheckOptions: %v", err)
	}
}

func TestProgressReachesWhoAsked(t *testing.T) {
	var got Progress
	ReportProgress(WithProgress(t.Context(), func(p Progress) { got = p }), Progress{Step: "copy", Entries: 2})
	if got.Step != "copy" || got.Entries != 2 {
		t.Errorf("got %+v", got)
	}
	ReportProgress(t.Context(), Progress{}) // nobody asked
}
