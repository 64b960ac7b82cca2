package kprobe

import (
	"encoding/json"
	"sync"
	"testing"
)

func TestOnceCachesOnlyDefiniteAnswers(t *testing.T) {
	answers := []Answer{Unknown, Unknown, No, Yes}
	calls := 0
	probe := Once(func() Result {
		calls++
		return Result{Feature: "f", Answer: answers[calls-1]}
	})
	for i, want := range []Answer{Unknown, Unknown, No, No, No} {
		if got := probe().Answer; got != want {
			t.Errorf("call %d: %v, want %v", i, got, want)
		}
	}
	if calls != 3 {
		t.Errorf("tried %d times, want 3", calls)
	}
}

func TestOnceTriesOnceForManyCallers(t *testing.T) {
	calls := 0
	probe := Once(func() Result { calls++; return Result{Answer: Yes} })
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() { probe() })
	}
	wg.Wait()
	if calls != 1 {
		t.Errorf("tried %d times", calls)
	}
}

func TestAnswersInWords(t *testing.T) {
	for r, want := range map[Result]string{
		{Feature: "x", Answer: Yes}:                                              "x: yes",
		{Feature: "x", Answer: No, Detail: "since kernel 9"}:                     "x: no (since kernel 9)",
		{Feature: "x", Detail: "EPERM"}:                                          "x: could not tell (EPERM)",
		{Feature: "lowerdir+", Answer: No, Detail: "Unknown parameter (EINVAL)"}: "lowerdir+: no (Unknown parameter (EINVAL))",
	} {
		if got := r.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
	b, err := json.Marshal(Result{Feature: "x"})
	if want := `{"feature":"x","answer":"unknown"}`; string(b) != want || err != nil {
		t.Errorf("%s, %v; want %s", b, err, want)
	}
}
