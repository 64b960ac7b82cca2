// Package send reads the stream that BTRFS_IOC_SEND writes, versions 1 and 2, as
// typed commands. It does nothing in a file system, and knows no ioctl: see
// package ioctl for what makes a stream.
//
// The stream is little-endian: the magic and a version, then commands, each of
// a length, a number, a CRC-32C and attributes (fs/btrfs/send.h, 6.18). A Reader
// takes any reader of bytes and holds one command in memory, at most MaxCommand.
package send

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/containerd/errdefs"
)

const (
	magic     = "btrfs-stream\x00"
	headerLen = 10 // of a command: u32 length, u16 command, u32 crc

	// MaxVersion is the newest version of the format that a Reader takes.
	MaxVersion = 2
	// MaxCommand bounds a command: those with data hold 128 KiB of it, in version 2
	// an encoded extent of 128 KiB and two pages.
	MaxCommand = 1 << 20
)

// Verb says what a command does, with the kernel's words.
type Verb uint16

// The commands of version 1 and, from FALLOCATE on, of version 2.
const (
	SUBVOL Verb = iota + 1
	SNAPSHOT
	MKFILE
	MKDIR
	MKNOD
	MKFIFO
	MKSOCK
	SYMLINK
	RENAME
	LINK
	UNLINK
	RMDIR
	SET_XATTR
	REMOVE_XATTR
	WRITE
	CLONE
	TRUNCATE
	CHMOD
	CHOWN
	UTIMES
	END
	UPDATE_EXTENT
	FALLOCATE
	FILEATTR
	ENCODED_WRITE
)

var verbs = [...]string{"", "SUBVOL", "SNAPSHOT", "MKFILE", "MKDIR", "MKNOD", "MKFIFO", "MKSOCK", "SYMLINK", "RENAME", "LINK",
	"UNLINK", "RMDIR", "SET_XATTR", "REMOVE_XATTR", "WRITE", "CLONE", "TRUNCATE", "CHMOD", "CHOWN", "UTIMES", "END",
	"UPDATE_EXTENT", "FALLOCATE", "FILEATTR", "ENCODED_WRITE"}

func (v Verb) String() string {
	if int(v) < len(verbs) && v > 0 {
		return verbs[v]
	}
	return fmt.Sprintf("command %d", uint16(v))
}

// Timespec is a time as the stream has it.
type Timespec struct {
	Sec  int64
	Nsec uint32
}

// Command is one command. A field that the verb has not is zero. Strings are the
// bytes that they are; paths are relative to the subvolume's root, "" for the
// root itself.
type Command struct {
	Verb  Verb
	Path  string
	To    string // RENAME: the new path
	Link  string // LINK: the path that is there; SYMLINK: the target
	Ino   uint64 // of what is made
	Mode  uint64 // of what is made: with its type
	Rdev  uint64
	UID   uint64
	GID   uint64
	Atime Timespec
	Mtime Timespec
	Ctime Timespec

	Offset uint64 // of data
	Size   uint64 // TRUNCATE: the new size; UPDATE_EXTENT, FALLOCATE: a length
	Data   []byte // WRITE, ENCODED_WRITE: valid until the next command

	XattrName  string
	XattrValue []byte // valid until the next command

	UUID     [16]byte // SUBVOL, SNAPSHOT
	Ctransid uint64

	CloneUUID     [16]byte // SNAPSHOT: of the parent; CLONE: of the source
	CloneCtransid uint64
	ClonePath     string
	CloneOffset   uint64
	CloneLen      uint64

	FallocateMode uint32
	FileAttr      uint64
	// ENCODED_WRITE
	UnencodedFileLen, UnencodedLen, UnencodedOffset uint64
	Compression, Encryption                         uint32
}

// Reader reads a stream. For one goroutine.
type Reader struct {
	r       *bufio.Reader
	version uint32
	buf     []byte
	n       int // commands read
}

// NewReader reads the head of a stream. A stream that is damaged, or newer than
// MaxVersion, wraps ErrInvalidArgument.
func NewReader(r io.Reader) (*Reader, error) {
	s := &Reader{r: bufio.NewReaderSize(r, 64<<10)}
	head := make([]byte, len(magic)+4)
	if _, err := io.ReadFull(s.r, head); err != nil {
		return nil, s.cut("the head", err)
	}
	if string(head[:len(magic)]) != magic {
		return nil, s.bad("no send stream: it begins with %q", head[:len(magic)])
	}
	if s.version = le.Uint32(head[len(magic):]); s.version == 0 || s.version > MaxVersion {
		return nil, s.bad("version %d, known are 1 to %d", s.version, MaxVersion)
	}
	return s, nil
}

// Version is the stream's.
func (s *Reader) Version() uint32 { return s.version }

var (
	le    = binary.LittleEndian
	table = crc32.MakeTable(crc32.Castagnoli)
)

// checksum is the kernel's crc32c with seed 0: neither end is inverted.
func checksum(parts ...[]byte) uint32 {
	c := ^uint32(0)
	for _, p := range parts {
		c = crc32.Update(c, table, p)
	}
	return ^c
}

func (s *Reader) bad(format string, args ...any) error {
	return fmt.Errorf("send stream: command %d: %s: %w", s.n, fmt.Sprintf(format, args...), errdefs.ErrInvalidArgument)
}

// cut is what a stream that ends too early is; other errors of the reader pass.
func (s *Reader) cut(what string, err error) error {
	if err == io.EOF || err == io.ErrUnexpectedEOF {
		return s.bad("the stream ends in %s", what)
	}
	return fmt.Errorf("send stream: %w", err)
}

// Next returns the next command; io.EOF after END. A stream without END is an
// error.
func (s *Reader) Next() (Command, error) {
	s.n++
	var head [headerLen]byte
	if _, err := io.ReadFull(s.r, head[:]); err != nil {
		return Command{}, s.cut("a command", err)
	}
	size, verb, sum := le.Uint32(head[:]), Verb(le.Uint16(head[4:])), le.Uint32(head[6:])
	if size > MaxCommand {
		return Command{}, s.bad("%s of %d bytes", verb, size)
	}
	if cap(s.buf) < int(size) {
		s.buf = make([]byte, size)
	}
	body := s.buf[:size]
	if _, err := io.ReadFull(s.r, body); err != nil {
		return Command{}, s.cut(verb.String(), err)
	}
	clear(head[6:])
	if got := checksum(head[:], body); got != sum {
		return Command{}, s.bad("%s: checksum %08x, want %08x", verb, got, sum)
	}
	c, err := s.decode(verb, body)
	if err == nil && verb == END {
		err = io.EOF
	}
	return c, err
}

func (s *Reader) decode(verb Verb, body []byte) (Command, error) {
	c := Command{Verb: verb}
	if verb == 0 || verb > ENCODED_WRITE || s.version < 2 && verb >= FALLOCATE {
		return c, s.bad("%s is not of version %d", verb, s.version)
	}
	var seen uint64
	for len(body) > 0 {
		if len(body) < 2 {
			return c, s.bad("%s: an attribute without its head", verb)
		}
		a := attribute(le.Uint16(body))
		value, rest, ok := s.value(a, body[2:])
		if !ok {
			return c, s.bad("%s: attribute %d ends too early", verb, a)
		}
		body = rest
		if err := c.set(a, value); err != nil {
			return c, s.bad("%s: attribute %d of %d bytes: %v", verb, a, len(value), err)
		}
		seen |= 1 << a
	}
	if missing := needs[verb] &^ seen; missing != 0 {
		return c, s.bad("%s lacks attributes (mask %#x)", verb, missing)
	}
	return c, nil
}

// value cuts the value of an attribute off. From version 2 on data has no length:
// it is the rest of the command.
func (s *Reader) value(a attribute, b []byte) (value, rest []byte, ok bool) {
	if a == attrData && s.version >= 2 {
		return b, nil, true
	}
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(le.Uint16(b))
	if b = b[2:]; len(b) < n {
		return nil, nil, false
	}
	return b[:n], b[n:], true
}

var errSize = errors.New("the size is wrong")
