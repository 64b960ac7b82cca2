package send

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// kernels is the beginning of a stream that a kernel wrote (6.18, NO_FILE_DATA):
// a subvolume with a file f. The commands up to RENAME.
const kernels = "62747266732d73747265616d0001000000" +
	"25000000010 0f0efbbd20f000100620100 10003efa42dd9c45a643abec4f67303b8e96 02000800 0700000000000000" +
	"1c00000013000237 2d8c0f00000006000800 0000000000000000 07000800 0000000000000000" +
	"1000000012005955 75350f0000000500 0800ed01000000000000" +
	"1800000003006c6e db030f0008006f32 35372d372d300300 08000101000000000000" +
	"110000000900e66c f0260f0008006f32 35372d372d301000 010066"

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// attr encodes an attribute; command a command.
func attr(a attribute, v string) []byte {
	b := le.AppendUint16(nil, uint16(a))
	return append(le.AppendUint16(b, uint16(len(v))), v...)
}

func command(v Verb, attrs ...[]byte) []byte {
	body := bytes.Join(attrs, nil)
	b := le.AppendUint32(nil, uint32(len(body)))
	b = le.AppendUint16(b, uint16(v))
	sum := checksum(b, []byte{0, 0, 0, 0}, body)
	return append(le.AppendUint32(b, sum), body...)
}

func u64(n uint64) string { return string(le.AppendUint64(nil, n)) }

func head(version uint32) []byte { return le.AppendUint32([]byte(magic), version) }

func read(b []byte) (all []Command, err error) {
	r, err := NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	for {
		c, err := r.Next()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		c.Data, c.XattrValue = bytes.Clone(c.Data), bytes.Clone(c.XattrValue)
		all = append(all, c)
	}
}

func TestWhatAKernelWrote(t *testing.T) {
	all, err := read(append(unhex(t, kernels), command(END)...))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, c := range all {
		got = append(got, c.Verb.String()+" "+c.Path+" "+c.To)
	}
	want := "SUBVOL b |CHOWN  |CHMOD  |MKFILE o257-7-0 |RENAME o257-7-0 f"
	if s := strings.Join(got, "|"); s != want {
		t.Errorf("%s, want %s", s, want)
	}
	if all[0].Ctransid != 7 || all[2].Mode != 0o755 || all[3].Ino != 257 {
		t.Errorf("%+v", all)
	}
}

func TestVersion2(t *testing.T) {
	data := append(le.AppendUint16(nil, uint16(attrData)), "the rest"...)
	b := append(head(2), command(WRITE, attr(attrPath, "f"), attr(attrFileOffset, u64(3)), data)...)
	b = append(b, command(FILEATTR, attr(attrPath, "f"), attr(attrFileAttr, u64(16)))...)
	all, err := read(append(b, command(END)...))
	if err != nil || len(all) != 2 || string(all[0].Data) != "the rest" || all[0].Offset != 3 || all[1].FileAttr != 16 {
		t.Fatalf("%+v, %v", all, err)
	}
}

func TestDamagedStreamsAreRefused(t *testing.T) {
	good := append(unhex(t, kernels), command(END)...)
	flipped := bytes.Clone(good)
	flipped[40] ^= 1
	for name, b := range map[string][]byte{
		"nothing":              nil,
		"another magic":        []byte("btrfs-streaM\x00\x01\x00\x00\x00"),
		"version 0":            head(0),
		"version 3":            head(3),
		"no END":               unhex(t, kernels),
		"cut in a command":     good[:60],
		"cut in a head":        good[:20],
		"a bit flipped":        flipped,
		"too long":             append(head(1), 0xff, 0xff, 0xff, 0x7f, 1, 0, 0, 0, 0, 0),
		"unknown command":      append(head(1), command(99)...),
		"version 2's in 1":     append(head(1), command(FALLOCATE, attr(attrPath, "f"))...),
		"attribute missing":    append(head(1), command(RENAME, attr(attrPath, "f"))...),
		"attribute too long":   append(head(1), command(MKFILE, []byte{15, 0, 9, 0, 'f'})...),
		"attribute's head cut": append(head(1), command(MKFILE, []byte{15})...),
		"a number of 4 bytes":  append(head(1), command(TRUNCATE, attr(attrPath, "f"), attr(attrSize, "1234"))...),
		"NUL in a path":        append(head(1), command(MKFILE, attr(attrPath, "a\x00"))...),
		"unknown attribute":    append(head(1), command(MKFILE, attr(attrPath, "a"), attr(60, "a"))...),
	} {
		if _, err := read(b); !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%s: %v, want ErrInvalidArgument", name, err)
		}
	}
	broken := errors.New("broken pipe")
	_, err := NewReader(io.MultiReader(bytes.NewReader(head(1)[:5]), &failing{broken}))
	if !errors.Is(err, broken) {
		t.Errorf("an error of the reader: %v", err)
	}
}

type failing struct{ err error }

func (f *failing) Read([]byte) (int, error) { return 0, f.err }

// FuzzReader: whatever comes is commands or an error. The checksum is put right
// so that the fuzzer gets past it.
func FuzzReader(f *testing.F) {
	f.Add(uint32(1), uint16(RENAME), append(attr(attrPath, "a"), attr(attrPathTo, "b")...))
	f.Add(uint32(2), uint16(WRITE), append(attr(attrPath, "a"), 19, 0, 'x'))
	f.Add(uint32(1), uint16(UTIMES), append(attr(attrPath, "a"), attr(attrMtime, "012345678901")...))
	f.Fuzz(func(t *testing.T, version uint32, verb uint16, body []byte) {
		if len(body) > MaxCommand {
			return
		}
		b := append(head(version), command(Verb(verb), body)...)
		all, err := read(append(b, command(END)...))
		if err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v", err)
		}
		if err == nil && len(all) != 1 && Verb(verb) != END {
			t.Errorf("%d commands", len(all))
		}
		if _, err := read(body); err != nil && !errors.Is(err, errdefs.ErrInvalidArgument) {
			t.Errorf("%v", err)
		}
	})
}
