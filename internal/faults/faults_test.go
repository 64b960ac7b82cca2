package faults

import (
	"context"
	"errors"
	"slices"
	"testing"
)

func TestPointWithoutHookLooksAtTheContext(t *testing.T) {
	if err := Point(t.Context(), "x"); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Point(ctx, "x"); !errors.Is(err, context.Canceled) {
		t.Errorf("after cancel: %v", err)
	}
}

func TestHookSeesStepsOfItsContextOnly(t *testing.T) {
	var steps []string
	ctx := With(t.Context(), func(step string) error { steps = append(steps, step); return nil })
	_ = Point(ctx, "one")
	_ = Point(t.Context(), "elsewhere")
	_ = Point(context.WithoutCancel(ctx), "two")
	if !slices.Equal(steps, []string{"one", "two"}) {
		t.Errorf("steps %q", steps)
	}
}

func TestHookFailsAndCancels(t *testing.T) {
	boom := errors.New("boom")
	if err := Point(With(t.Context(), func(string) error { return boom }), "x"); err != boom {
		t.Errorf("the hook's error: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ctx = With(ctx, func(string) error { cancel(); return nil })
	if err := Point(ctx, "x"); !errors.Is(err, context.Canceled) {
		t.Errorf("a hook that cancels: %v", err)
	}
}

func TestEverywhereIsAskedFirst(t *testing.T) {
	boom := errors.New("boom")
	Everywhere(func(step string) error {
		if step == "bad" {
			return boom
		}
		return nil
	})
	defer Everywhere(nil)
	var steps []string
	ctx := With(t.Context(), func(step string) error { steps = append(steps, step); return nil })
	if err := Point(ctx, "bad"); err != boom {
		t.Errorf("the process's hook: %v", err)
	}
	if err := Point(ctx, "good"); err != nil || !slices.Equal(steps, []string{"good"}) {
		t.Errorf("%v, the context's hook saw %q", err, steps)
	}
}
