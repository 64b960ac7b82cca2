package dm

import (
	"encoding/hex"
	"errors"
	"reflect"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
)

func bytesOf(t *testing.T, h string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(h, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// The bytes are those that a C compiler gives for struct dm_ioctl.
func TestGoldenHeader(t *testing.T) {
	b := make([]byte, headerSize)
	h := header{targets: 2, flags: DM_SUSPEND_FLAG | DM_NOFLUSH_FLAG, event: 7, dev: 0xfd05, name: "nm", uuid: "uu"}
	h.encode(b)
	want := bytesOf(t, "04000000 1b000000 00000000 38010000 38010000 02000000 00000000 02080000 07000000 00000000 05fd000000000000"+
		"6e6d"+strings.Repeat("00", 126)+"7575"+strings.Repeat("00", 134))
	if !reflect.DeepEqual(b, want) {
		t.Errorf("%x, want\n%x", b, want)
	}
	le.PutUint32(b[24:], 3)
	got, data, err := decode(b)
	h.version, h.open = Version{4, 27, 0}, 3
	if err != nil || len(data) != 0 || got != h {
		t.Errorf("%+v, %d bytes, %v; want %+v", got, len(data), err, h)
	}
	if i := got.info(); !i.Suspended || i.Dev != (Dev{253, 5}) || i.Path() != "/dev/dm-5" || i.Open != 3 {
		t.Errorf("%+v", i)
	}
}

func TestGoldenTable(t *testing.T) {
	table := []Target{{0, 8, "linear", "7:0 0"}, {8, 16, "zero", ""}}
	b, err := encodeTable(table)
	want := bytesOf(t, "0000000000000000 0800000000000000 00000000 30000000 6c696e65617200000000000000000000 373a302030000000"+
		"0800000000000000 1000000000000000 00000000 30000000 7a65726f000000000000000000000000 0000000000000000")
	if err != nil || !reflect.DeepEqual(b, want) {
		t.Errorf("%x, %v; want\n%x", b, err, want)
	}
	le.PutUint32(b[48+20:], 96) // an answer counts from the first target
	got, err := decodeTable(b, 2)
	if err != nil || !reflect.DeepEqual(got, table) {
		t.Errorf("%v, %v", got, err)
	}
	if s := table[0].String() + "|" + table[1].String(); s != "0 8 linear 7:0 0|8 16 zero" {
		t.Errorf("%q", s)
	}
}

func TestGoldenLists(t *testing.T) {
	names, err := decodeNames(bytesOf(t, "00fd000000000000 18000000 6100 0000000000000000 0000 0105f0000f000000 00000000 626300"))
	if want := []Name{{"a", Dev{253, 0}}, {"bc", Dev{5, 0xff01}}}; err != nil || len(names) != 2 || names[0] != want[0] || names[1].Name != "bc" {
		t.Errorf("%v, %v; want %v", names, err, want)
	}
	if names, err := decodeNames(make([]byte, 16)); len(names) != 0 || err != nil {
		t.Errorf("empty list: %v, %v", names, err)
	}
	versions, err := decodeVersions(bytesOf(t, "14000000 01000000 02000000 03000000 74000000 00000000 04000000 05000000 06000000 7500"))
	if want := map[string]Version{"t": {1, 2, 3}, "u": {4, 5, 6}}; err != nil || !reflect.DeepEqual(versions, want) {
		t.Errorf("%v, %v", versions, err)
	}
	deps, err := decodeDeps(bytesOf(t, "02000000 00000000 0007000000000000 01fd100000000000"))
	if want := []Dev{{7, 0}, {253, 0x101}}; err != nil || !reflect.DeepEqual(deps, want) {
		t.Errorf("%v, %v", deps, err)
	}
}

func TestShortAnswersAreErrors(t *testing.T) {
	_, _, e1 := decode(make([]byte, headerSize-1))
	_, e2 := decodeTable(make([]byte, specSize), 1) // no NUL after the target
	_, e3 := decodeNames([]byte{1, 0, 0, 0, 0, 0, 0, 0, 200, 0, 0, 0, 'a', 0})
	_, e4 := decodeVersions(append([]byte{200, 0, 0, 0}, make([]byte, 14)...))
	_, e5 := decodeDeps([]byte{2, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1})
	for i, err := range []error{e1, e2, e3, e4, e5} {
		if !errors.Is(err, syscall.EBADMSG) {
			t.Errorf("%d: %v, want EBADMSG", i+1, err)
		}
	}
}

// Names that the header does not hold never reach the kernel, which would cut them.
func TestBadNamesAreRefused(t *testing.T) {
	c := &Control{}
	for _, name := range []string{"", "a/b", "a\x00b", strings.Repeat("n", 128)} {
		_, e1 := c.Create(name, "")
		_, e2 := c.Info(name)
		for i, err := range []error{e1, e2, c.Load(name, nil, false), c.Remove(name, false), c.Rename("a", name)} {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q, %d: %v", name, i, err)
			}
		}
	}
	if _, err := c.Create("a", strings.Repeat("u", 129)); !errdefs.IsInvalidArgument(err) {
		t.Errorf("uuid: %v", err)
	}
	if err := c.Load("a", []Target{{Type: strings.Repeat("t", 16)}}, false); !errdefs.IsInvalidArgument(err) {
		t.Errorf("target: %v", err)
	}
}

func TestControlNodeIsNamedByMisc(t *testing.T) {
	if m, ok := miscMinor(" 59 ubi_ctrl\n236 device-mapper\n130 watchdog\n"); m != 236 || !ok {
		t.Errorf("%d, %v", m, ok)
	}
	if _, ok := miscMinor("130 watchdog\n"); ok {
		t.Error("found where there is none")
	}
}

// FuzzDecode: whatever comes is decoded or an error.
func FuzzDecode(f *testing.F) {
	table, _ := encodeTable([]Target{{0, 8, "linear", "7:0 0"}})
	f.Add(table, uint32(1))
	f.Add(make([]byte, headerSize), uint32(0))
	f.Fuzz(func(t *testing.T, b []byte, count uint32) {
		if targets, err := decodeTable(b, count%1024); err == nil && uint32(len(targets)) != count%1024 {
			t.Errorf("%d targets of %d", len(targets), count%1024)
		}
		_, data, err := decode(b)
		if err == nil && len(data) > len(b) {
			t.Error("more data than there is")
		}
		_, _ = decodeNames(b)
		_, _ = decodeVersions(b)
		_, _ = decodeDeps(b)
	})
}
