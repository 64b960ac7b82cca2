package testenv

import (
	"os"
	"strconv"
	"testing"
)

// Number is what an environment variable says, such as LAYERCTL_SEED, or, where it is
// not set, another number.
func Number(t testing.TB, name string, otherwise uint64) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}
