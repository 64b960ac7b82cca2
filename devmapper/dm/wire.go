package dm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"
)

var le = binary.LittleEndian

// headerSize is that of struct dm_ioctl, specSize of struct dm_target_spec.
const (
	headerSize = 312
	specSize   = 40
)

// errBadName says that a name cannot be one; errShort that an answer is not what
// the header describes.
var (
	errBadName = errors.New("too long, empty, or with a NUL or slash in it")
	errShort   = fmt.Errorf("an answer that does not hold what it says: %w", syscall.EBADMSG)
)

// header is struct dm_ioctl without its sizes.
type header struct {
	version    Version
	targets    uint32
	open       int32
	flags      uint32
	event      uint32
	dev        uint64
	name, uuid string
}

func (h *header) object() string {
	if h.name != "" {
		return h.name
	}
	return h.uuid
}

func (h *header) valid() error {
	if len(h.name) >= maxName || len(h.uuid) >= maxUUID || strings.ContainsAny(h.name, "/\x00") || strings.Contains(h.uuid, "\x00") {
		return fmt.Errorf("name %q, uuid %q: %w", h.name, h.uuid, errBadName)
	}
	return nil
}

func (h *header) encode(b []byte) {
	le.PutUint32(b[0:], wantMajor)
	le.PutUint32(b[4:], wantMinor)
	le.PutUint32(b[12:], uint32(len(b)))
	le.PutUint32(b[16:], headerSize)
	le.PutUint32(b[20:], h.targets)
	le.PutUint32(b[28:], h.flags)
	le.PutUint32(b[32:], h.event)
	le.PutUint64(b[40:], h.dev)
	copy(b[48:], h.name)
	copy(b[176:], h.uuid)
}

// decode takes an answer apart; data is what the header says follows it.
func decode(b []byte) (h header, data []byte, err error) {
	if len(b) < headerSize {
		return h, nil, errShort
	}
	h.version = Version{le.Uint32(b[0:]), le.Uint32(b[4:]), le.Uint32(b[8:])}
	size, start := le.Uint32(b[12:]), le.Uint32(b[16:])
	h.targets, h.open, h.flags = le.Uint32(b[20:]), int32(le.Uint32(b[24:])), le.Uint32(b[28:])
	h.event, h.dev = le.Uint32(b[32:]), le.Uint64(b[40:])
	name, ok1 := text(b[48 : 48+maxName])
	uuid, ok2 := text(b[176 : 176+maxUUID])
	if !ok1 || !ok2 {
		return h, nil, errShort
	}
	h.name, h.uuid = name, uuid
	// An answer without data has the size of the header, and any start.
	if uint64(size) > uint64(len(b)) || start > size {
		return h, nil, nil
	}
	return h, b[start:size], nil
}

// Target is one line of a table: so many sectors of 512 bytes from Start on are
// what Type makes of Params. In a status Params is what the target says of itself.
type Target struct {
	Start, Length uint64
	Type          string
	Params        string
}

func (t Target) String() string {
	return strings.TrimSuffix(fmt.Sprintf("%d %d %s %s", t.Start, t.Length, t.Type, t.Params), " ")
}

func encodeTable(table []Target) ([]byte, error) {
	var b []byte
	for _, t := range table {
		if t.Type == "" || len(t.Type) >= maxType || strings.Contains(t.Type+t.Params, "\x00") {
			return nil, fmt.Errorf("target %q: %w", t.Type, errBadName)
		}
		size := (specSize + len(t.Params) + 1 + 7) &^ 7
		s := make([]byte, size)
		le.PutUint64(s[0:], t.Start)
		le.PutUint64(s[8:], t.Length)
		le.PutUint32(s[20:], uint32(size)) // from this one to the next
		copy(s[24:], t.Type)
		copy(s[specSize:], t.Params)
		b = append(b, s...)
	}
	return b, nil
}

func decodeTable(b []byte, count uint32) ([]Target, error) {
	var table []Target
	at := 0
	for range count {
		if at < 0 || at > len(b)-specSize {
			return nil, errShort
		}
		s := b[at:]
		typ, ok1 := text(s[24 : 24+maxType])
		params, ok2 := text(s[specSize:])
		if !ok1 || !ok2 {
			return nil, errShort
		}
		table = append(table, Target{le.Uint64(s[0:]), le.Uint64(s[8:]), typ, params})
		at = int(le.Uint32(s[20:])) // from the first one
	}
	return table, nil
}

// Name is an entry of List.
type Name struct {
	Name string
	Dev  Dev
}

// decodeNames reads a chain of struct dm_name_list.
func decodeNames(b []byte) ([]Name, error) {
	var names []Name
	for at := 0; len(b) > 0; {
		if at > len(b)-13 {
			return nil, errShort
		}
		dev, next := le.Uint64(b[at:]), le.Uint32(b[at+8:])
		if dev == 0 {
			return names, nil // how an empty list is said
		}
		name, ok := text(b[at+12:])
		if !ok {
			return nil, errShort
		}
		names = append(names, Name{name, decodeDev(dev)})
		if next == 0 {
			return names, nil
		}
		if uint64(next) > uint64(len(b)-at) {
			return nil, errShort
		}
		at += int(next)
	}
	return names, nil
}

// decodeVersions reads a chain of struct dm_target_versions.
func decodeVersions(b []byte) (map[string]Version, error) {
	all := map[string]Version{}
	for at := 0; len(b) > 0; {
		if at > len(b)-17 {
			return nil, errShort
		}
		name, ok := text(b[at+16:])
		if !ok {
			return nil, errShort
		}
		all[name] = Version{le.Uint32(b[at+4:]), le.Uint32(b[at+8:]), le.Uint32(b[at+12:])}
		next := le.Uint32(b[at:])
		if next == 0 {
			return all, nil
		}
		if uint64(next) > uint64(len(b)-at) {
			return nil, errShort
		}
		at += int(next)
	}
	return all, nil
}

// decodeDeps reads struct dm_target_deps.
func decodeDeps(b []byte) ([]Dev, error) {
	if len(b) < 8 {
		return nil, errShort
	}
	n := uint64(le.Uint32(b))
	if n > uint64(len(b)-8)/8 {
		return nil, errShort
	}
	var devs []Dev
	for i := range n {
		devs = append(devs, decodeDev(le.Uint64(b[8+8*i:])))
	}
	return devs, nil
}

// Dev is a block device's number.
type Dev struct{ Major, Minor uint32 }

func (d Dev) String() string { return fmt.Sprintf("%d:%d", d.Major, d.Minor) }

// decodeDev undoes the kernel's huge_encode_dev (include/linux/kdev_t.h).
func decodeDev(d uint64) Dev {
	return Dev{Major: uint32(d>>8) & 0xfff, Minor: uint32(d)&0xff | uint32(d>>12)&^0xff}
}
