package main

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// makeLowers makes the two lower layers: lower1 has the tree twice and a file of
// 256 MiB, lower2 has some of the first tree's directories again, so that these are
// merged ones.
func makeLowers(dir string) error {
	tree := *treeDir
	if tree == "" {
		out, err := exec.Command("go", "env", "GOROOT").Output()
		if err != nil {
			return fmt.Errorf("go env GOROOT: %w", err)
		}
		tree = strings.TrimSpace(string(out))
	}
	low1, low2 := filepath.Join(dir, "lower1"), filepath.Join(dir, "lower2")
	for _, c := range [][]string{
		{"mkdir", "-p", low1 + "/data", low2 + "/tree1/src"},
		{"cp", "-a", tree, low1 + "/tree1"},
		{"cp", "-a", tree, low1 + "/tree2"},
		{"chown", "-R", "0:0", low1 + "/tree1", low1 + "/tree2"},
	} {
		if err := command(c...); err != nil {
			return err
		}
	}
	for _, d := range []string{"cmd", "internal", "net"} {
		if from := low1 + "/tree1/src/" + d; exists(from) {
			if err := command("cp", "-a", from, low2+"/tree1/src/"+d); err != nil {
				return err
			}
		}
	}
	return writeBig(low1 + "/data/big")
}

// bigSize is the size of the file that is read, and removed.
const bigSize = 256 << 20

// writeBig writes a file of bytes that no file system stores as holes.
func writeBig(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	block := make([]byte, 1<<20)
	sum := sha256.Sum256([]byte("a start"))
	for i := 0; i < len(block); i += len(sum) {
		sum = sha256.Sum256(sum[:])
		copy(block[i:], sum[:])
	}
	for range bigSize / len(block) {
		if _, err := f.Write(block); err != nil {
			f.Close()
			return err
		}
	}
	return f.Close()
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
