package devmapper

import (
	"encoding/binary"
	"testing"

	"github.com/containerd/errdefs"
)

func TestSuperblockOfExt4(t *testing.T) {
	b := make([]byte, ext4Bytes)
	if _, err := parseExt4(b); !errdefs.IsDataLoss(err) {
		t.Errorf("zeros: %v", err)
	}
	binary.LittleEndian.PutUint16(b[atMagic:], ext4Magic)
	for i := range 16 {
		b[atUUID+i] = byte(i)
	}
	s, err := parseExt4(b)
	if err != nil || s.dirty || s.uuid != "00010203-0405-0607-0809-0a0b0c0d0e0f" {
		t.Errorf("%+v, %v", s, err)
	}
	b[atIncompat] = incompatRecover | 2
	if s, err := parseExt4(b); err != nil || !s.dirty {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := parseExt4(b[:100]); !errdefs.IsDataLoss(err) {
		t.Errorf("short: %v", err)
	}
}
