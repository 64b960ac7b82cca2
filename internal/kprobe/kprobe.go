// Package kprobe holds feature tests with three answers: yes, no, could not
// tell. A kernel feature is found out by trying it in a scratch directory or
// namespace that the test cleans up, never guessed from a version.
package kprobe

import (
	"fmt"
	"sync"
)

// Answer is the outcome of a feature test. The zero value is Unknown.
type Answer int

// The three answers.
const (
	Unknown Answer = iota // trying failed for a reason that says nothing about the feature
	Yes
	No
)

func (a Answer) String() string { return [...]string{"could not tell", "yes", "no"}[a] }

// MarshalText renders "yes", "no" or "unknown", for JSON.
func (a Answer) MarshalText() ([]byte, error) {
	return []byte([...]string{"unknown", "yes", "no"}[a]), nil
}

// Result is one feature's answer.
type Result struct {
	Feature string `json:"feature"` // the kernel's word: "redirect_dir", "FICLONE"
	Answer  Answer `json:"answer"`
	// Detail says why for No and Unknown, with the errno, and for No the first
	// kernel that has the feature.
	Detail string `json:"detail,omitempty"`
	Err    error  `json:"-"` // what the kernel said; nil for Yes
}

func (r Result) String() string {
	if r.Detail == "" {
		return fmt.Sprintf("%s: %s", r.Feature, r.Answer)
	}
	return fmt.Sprintf("%s: %s (%s)", r.Feature, r.Answer, r.Detail)
}

// Once caches f's answer for the life of the process when it is definite: an
// Unknown is tried again.
func Once(f func() Result) func() Result {
	var mu sync.Mutex
	var cached *Result
	return func() Result {
		mu.Lock()
		defer mu.Unlock()
		if cached != nil {
			return *cached
		}
		r := f()
		if r.Answer != Unknown {
			cached = &r
		}
		return r
	}
}
