package thin

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

func TestStatusLines(t *testing.T) {
	for line, want := range map[string]Status{
		"7 145/1024 12/1024 - rw discard_passdown queue_if_no_space - 256": {Transaction: 7, MetadataUsed: 145, MetadataTotal: 1024,
			DataUsed: 12, DataTotal: 1024, Passdown: true, Policy: Queue, MetadataLow: 256},
		"0 1/2 2/2 17 out_of_data_space no_discard_passdown error_if_no_space needs_check 0": {MetadataUsed: 1, MetadataTotal: 2,
			DataUsed: 2, DataTotal: 2, HeldRoot: 17, Mode: OutOfData, Policy: Error, NeedsCheck: true},
		"0 1/2 2/2 - ro discard_passdown queue_if_no_space -": {MetadataUsed: 1, MetadataTotal: 2, DataUsed: 2, DataTotal: 2,
			Mode: ReadOnly, Passdown: true, Policy: Queue}, // Linux 4.x
		"0 1/2 2/2 - rw new_word discard_passdown queue_if_no_space - 1": {MetadataUsed: 1, MetadataTotal: 2, DataUsed: 2, DataTotal: 2,
			Passdown: true, Policy: Queue, MetadataLow: 1},
		"Fail":  {Mode: Failed},
		"Error": {Mode: Failed},
	} {
		if got, err := ParseStatus(line); err != nil || got != want {
			t.Errorf("%q: %+v, %v; want %+v", line, got, err, want)
		}
	}
	for _, line := range []string{"", "7", "x 1/2 1/2 - rw a b", "1 1 1/2 - rw a b", "1 1/2 /2 - rw a b", "1 1/2 1/2 x rw a b", "1 1/2 1/2 - rw a 9x"} {
		if got, err := ParseStatus(line); !errors.Is(err, syscall.EBADMSG) {
			t.Errorf("%q: %+v, %v; want EBADMSG", line, got, err)
		}
	}
}

func FuzzStatus(f *testing.F) {
	f.Add("7 145/1024 12/1024 - rw discard_passdown queue_if_no_space - 256")
	f.Add("0 1/2 2/2 17 out_of_data_space no_discard_passdown error_if_no_space needs_check 0")
	f.Add("Fail")
	f.Fuzz(func(t *testing.T, line string) {
		if s, err := ParseStatus(line); err == nil {
			_ = s.Explain("p", "m", 16<<20)
			_ = s.Mode.String()
		} else if !errors.Is(err, syscall.EBADMSG) {
			t.Error(err)
		}
	})
}

func FuzzSuperblock(f *testing.F) {
	f.Add(make([]byte, superblockBytes))
	f.Add(superblockOf(9, 128, true))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseSuperblock(b); err != nil && s != (superblock{}) {
			t.Error("an error and a superblock")
		}
	})
}

// Each state that needs a person says what to do.
func TestExplainSaysWhatToDo(t *testing.T) {
	if err := (Status{MetadataTotal: 9}).Explain("p", "m", 16<<20); err != nil {
		t.Error(err)
	}
	for _, c := range []struct {
		s     Status
		is    error
		words []string
	}{
		{Status{Mode: Failed}, errdefs.ErrDataLoss, []string{"thin_check m", "thin_repair -i m"}},
		{Status{Mode: ReadOnly, NeedsCheck: true}, errdefs.ErrFailedPrecondition, []string{"needs a check", "`thin_check m`", "`dmsetup remove p`", "--clear-needs-check-flag m`", "`fallocate -l 16777216 /", "thin_repair -i m -o /"}},
		{Status{Mode: ReadOnly, NeedsCheck: true, MetadataUsed: 5, MetadataTotal: 5}, errdefs.ErrResourceExhausted, []string{"no space for metadata"}},
		{Status{Mode: OutOfData, DataTotal: 3}, errdefs.ErrResourceExhausted, []string{"no free data block of its 3"}},
		{Status{Mode: ReadOnly}, errdefs.ErrFailedPrecondition, []string{"read-only"}},
	} {
		err := c.s.Explain("p", "m", 16<<20)
		if !errors.Is(err, c.is) {
			t.Errorf("%+v: %v, want %v", c.s, err, c.is)
		}
		for _, w := range c.words {
			if err != nil && !strings.Contains(err.Error(), w) {
				t.Errorf("%v: want %q in it", err, w)
			}
		}
	}
}

func superblockOf(transaction uint64, blockSectors uint32, check bool) []byte {
	b := make([]byte, superblockBytes)
	le := binary.LittleEndian
	le.PutUint64(b[atMagic:], superblockMagic)
	le.PutUint32(b[atVersion:], 2)
	le.PutUint64(b[atTransaction:], transaction)
	le.PutUint32(b[atDataBlock:], blockSectors)
	if check {
		b[atFlags] = 1
	}
	return b
}

func TestSuperblock(t *testing.T) {
	s, err := parseSuperblock(superblockOf(9, 128, true))
	if want := (superblock{version: 2, transaction: 9, block: 65536, needsCheck: true}); err != nil || s != want {
		t.Errorf("%+v, %v; want %+v", s, err, want)
	}
	if s, err := parseSuperblock(make([]byte, superblockBytes)); err != nil || !s.zero {
		t.Errorf("%+v, %v", s, err)
	}
	file := filepath.Join(t.TempDir(), "m")
	for name, c := range map[string]struct {
		b    []byte
		r    record
		want error
	}{
		"as the record says":  {superblockOf(1, 128, false), record{Block: 65536}, nil},
		"another block size":  {superblockOf(1, 256, false), record{Block: 65536}, errdefs.ErrFailedPrecondition},
		"something else":      {[]byte(strings.Repeat("x", superblockBytes)), record{Block: 65536}, errdefs.ErrDataLoss},
		"nothing":             {make([]byte, superblockBytes), record{Block: 65536}, errdefs.ErrDataLoss},
		"nothing in a new":    {make([]byte, superblockBytes), record{Block: 65536, New: true}, nil},
		"too short for a one": {make([]byte, 100), record{Block: 65536}, errdefs.ErrDataLoss},
	} {
		if err := os.WriteFile(file, c.b, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := c.r.checkSuperblock(file); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %v", name, err, c.want)
		}
	}
}

func TestOptionsAreChecked(t *testing.T) {
	for _, o := range []Options{
		{Data: "/dev/x"}, {Metadata: "/dev/x"}, {Data: "/dev/x", Metadata: "/dev/y", DataBytes: 1 << 30},
		{BlockBytes: 4096}, {BlockBytes: 96 << 10}, {Full: "wait"}, {DataBytes: 1}, {MetadataBytes: -1},
	} {
		if err := o.check(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	r := Options{}.record()
	if r.Block != defaultBlock || r.Full != Queue || !r.New {
		t.Errorf("%+v", r)
	}
	if r := (Options{Data: "/dev/x", Metadata: "/dev/y"}).record(); r.Full != Error {
		t.Errorf("on devices: %+v", r)
	}
	for _, o := range []Options{{BlockBytes: 128 << 10}, {Full: Error}, {Data: "/dev/x", Metadata: "/dev/y"}} {
		if err := o.agree(r); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("%+v: %v", o, err)
		}
	}
	if err := (Options{DataBytes: 1 << 40}).agree(r); err != nil {
		t.Error(err)
	}
}
