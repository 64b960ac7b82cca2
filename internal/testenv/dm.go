package testenv

import (
	"os"
	"testing"
)

// envExpectDM is set where device-mapper was promised: in the guests of `make
// test-vm`.
const envExpectDM = "LAYERCTL_EXPECT_DM"

// NoDeviceMapper skips a test on a kernel without device-mapper, for which err
// is the reason, and fails it where there must be one.
func NoDeviceMapper(t testing.TB, err error) {
	t.Helper()
	if os.Getenv(envExpectDM) != "" {
		t.Fatalf("must not skip here (%s): %v", envExpectDM, err)
	}
	Optional(t, "no device-mapper in this kernel: make test-vm")
}

// AnyKernel skips a long test that is the same on every kernel where tests run once
// more for what the host's kernel lacks: in `make test-vm`, whose guests are slow.
func AnyKernel(t testing.TB) {
	t.Helper()
	if os.Getenv(envExpectDM) != "" {
		Optional(t, "the same on every kernel: make test has run it")
	}
}
