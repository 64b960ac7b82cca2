package thin

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
)

// Mode is what a pool can do.
type Mode int

// The modes, by the kernel's words: rw, out_of_data_space, ro, Fail.
const (
	ReadWrite Mode = iota
	OutOfData
	ReadOnly
	Failed
)

func (m Mode) String() string {
	return [...]string{"rw", "out_of_data_space", "ro", "Fail"}[m]
}

// Policy is what a pool without free blocks does with a write to a new one.
type Policy string

// The policies.
const (
	// Queue keeps writes waiting until the pool is larger, for at most
	// dm_thin_pool's no_space_timeout (60 s).
	Queue Policy = "queue"
	// Error fails them with ENOSPC.
	Error Policy = "error"
)

// Status is what a pool says of itself (Documentation/admin-guide/device-mapper/thin-provisioning.rst).
type Status struct {
	Transaction uint64
	// Blocks of 4096 bytes, and of the pool's block size.
	MetadataUsed, MetadataTotal uint64
	DataUsed, DataTotal         uint64
	HeldRoot                    uint64 // of the metadata snapshot; 0: there is none
	Mode                        Mode
	Passdown                    bool // discards reach the data device
	Policy                      Policy
	NeedsCheck                  bool
	MetadataLow                 uint64 // the kernel's own mark for metadata; 0 before Linux 5.0
}

var errStatus = fmt.Errorf("a status that this program does not understand: %w", syscall.EBADMSG)

// ParseStatus reads a pool's status line.
func ParseStatus(line string) (Status, error) {
	f := strings.Fields(line)
	if len(f) == 1 && (f[0] == "Fail" || f[0] == "Error") {
		return Status{Mode: Failed}, nil
	}
	s := Status{}
	if len(f) < 7 {
		return s, fmt.Errorf("%q: %w", line, errStatus)
	}
	var err [5]error
	s.Transaction, err[0] = strconv.ParseUint(f[0], 10, 64)
	s.MetadataUsed, s.MetadataTotal, err[1] = fraction(f[1])
	s.DataUsed, s.DataTotal, err[2] = fraction(f[2])
	if f[3] != "-" {
		s.HeldRoot, err[3] = strconv.ParseUint(f[3], 10, 64)
	}
	for _, w := range f[4:] {
		if e := s.word(w); e != nil {
			err[4] = e
		}
	}
	if e := errors.Join(err[:]...); e != nil {
		return Status{}, fmt.Errorf("%q: %w: %w", line, errStatus, e)
	}
	return s, nil
}

// word takes one word of the flags; a number is the low-water mark of metadata.
// Unknown words are a newer kernel's.
func (s *Status) word(w string) error {
	switch w {
	case "rw", "-":
	case "out_of_data_space":
		s.Mode = OutOfData
	case "ro":
		s.Mode = ReadOnly
	case "discard_passdown":
		s.Passdown = true
	case "queue_if_no_space":
		s.Policy = Queue
	case "error_if_no_space":
		s.Policy = Error
	case "needs_check":
		s.NeedsCheck = true
	default:
		if w[0] < '0' || w[0] > '9' {
			return nil
		}
		var err error
		s.MetadataLow, err = strconv.ParseUint(w, 10, 64)
		return err
	}
	return nil
}

func fraction(s string) (used, total uint64, err error) {
	a, b, ok := strings.Cut(s, "/")
	if !ok {
		return 0, 0, fmt.Errorf("%q is no fraction", s)
	}
	used, err1 := strconv.ParseUint(a, 10, 64)
	total, err2 := strconv.ParseUint(b, 10, 64)
	return used, total, errors.Join(err1, err2)
}

// Explain returns what is wrong with the pool, in words, with what to do; nil if
// nothing is. device is the pool's name, metadata what its metadata is on, which has
// so many bytes.
func (s Status) Explain(device, metadata string, bytes int64) error {
	repair := RepairWords(device, metadata, bytes)
	switch {
	case s.Mode == Failed:
		return fmt.Errorf("pool %s has failed, its metadata cannot be read or written: %w: %s", device, errdefs.ErrDataLoss, repair)
	case s.MetadataTotal > 0 && s.MetadataUsed >= s.MetadataTotal:
		return fmt.Errorf("pool %s has no space for metadata (%d blocks of 4 KiB): %w: remove layers, or make %s larger (a file grows by itself where its file system has room); if it stays read-only %s",
			device, s.MetadataTotal, errdefs.ErrResourceExhausted, metadata, repair)
	case s.NeedsCheck:
		return fmt.Errorf("pool %s needs a check of its metadata: %w: %s", device, errdefs.ErrFailedPrecondition, repair)
	case s.Mode == ReadOnly:
		return fmt.Errorf("pool %s is read-only: %w: %s", device, errdefs.ErrFailedPrecondition, repair)
	case s.Mode == OutOfData:
		return fmt.Errorf("pool %s has no free data block of its %d: %w: remove layers, or give it more space", device, s.DataTotal, errdefs.ErrResourceExhausted)
	}
	return nil
}

// RepairWords are the commands that mend a pool's metadata, which is on something of so many
// bytes.
func RepairWords(device, metadata string, bytes int64) string {
	return fmt.Sprintf("unmount its layers and close every store on it, `dmsetup remove %s` if that is still there, then `thin_check %s`; "+
		"if that finds nothing `thin_check --clear-needs-check-flag %s`, else %s", device, metadata, metadata, RebuildWords(metadata, bytes))
}

// RebuildWords are the command that makes the metadata of an inactive pool anew; a file of
// its size takes what thin_repair saves.
func RebuildWords(metadata string, bytes int64) string {
	return fmt.Sprintf("`fallocate -l %d /var/tmp/metadata.new && thin_repair -i %s -o /var/tmp/metadata.new && "+
		"dd if=/var/tmp/metadata.new of=%s bs=1M conv=notrunc,fsync && thin_check --clear-needs-check-flag %s` (package thin-provisioning-tools)",
		max(bytes, leastRepair), metadata, metadata, metadata)
}

// leastRepair is what metadata has that cannot be opened.
const leastRepair = 2 << 20
