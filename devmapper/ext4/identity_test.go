package ext4

import (
	"bytes"
	"testing"

	"github.com/containerd/errdefs"
)

func TestIdentify(t *testing.T) {
	disk := make([]byte, superOffset+superSize)
	b := disk[superOffset:]
	if _, err := Identify(bytes.NewReader(disk)); !errdefs.IsDataLoss(err) {
		t.Errorf("zeros: %v", err)
	}
	le.PutUint16(b[superMagicAt:], superMagic)
	for i := range 16 {
		b[superUUIDAt+i] = byte(i)
	}
	s, err := Identify(bytes.NewReader(disk))
	if err != nil || s.Dirty || s.UUID != "00010203-0405-0607-0809-0a0b0c0d0e0f" {
		t.Errorf("%+v, %v", s, err)
	}
	b[superIncompatAt] = incompatRecover | 2
	if s, err := Identify(bytes.NewReader(disk)); err != nil || !s.Dirty {
		t.Errorf("%+v, %v", s, err)
	}
	if _, err := Identify(bytes.NewReader(disk[:superOffset+100])); !errdefs.IsDataLoss(err) {
		t.Errorf("short: %v", err)
	}
}
