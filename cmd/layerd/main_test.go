package main

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/log"

	"github.com/layerctl/layerctl/internal/testenv"
)

// TestMain runs the program itself where the test binary is called layerd.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "layerd" {
		if dir := os.Getenv(envKill); dir != "" {
			obeyOrders(dir)
		}
		os.Exit(run(os.Args[1:]))
	}
	_ = log.SetLevel("panic") // of the content store that tests serve
	testenv.Main(m, testenv.FUSEServer)
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
