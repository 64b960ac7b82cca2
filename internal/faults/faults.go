// Package faults lets a test stand at the steps of a change that has many of
// them. Code calls Point between two steps, by name; a test puts a Hook into the
// context that records the names, fails one of them, cancels the context there
// or ends the process. Without a hook a Point costs one look into the context.
//
// A hook belongs to a context and not to the process, so tests that run at the
// same time do not meet. A program that a test runs as a process of its own, whose
// calls come from outside and bring no context, has one for all: Everywhere.
package faults

import "context"

// Hook is told each step that is reached. An error that it returns is the
// step's error. It may be called by several goroutines at once.
type Hook func(step string) error

type hookKey struct{}

// With returns a context whose Points call h.
func With(ctx context.Context, h Hook) context.Context {
	return context.WithValue(ctx, hookKey{}, h)
}

// everywhere is called at every Point of the process; nil where nobody asked.
var everywhere Hook

// Everywhere has h called at each Point of this process, whatever the context, before
// the context's own hook. It is for the first line of a test's main function, when
// nothing else runs yet; no program calls it.
func Everywhere(h Hook) { everywhere = h }

// Point marks the place between two steps, named by what has been done:
// "native: create: copied". It returns what the hook says, or else ctx.Err(), so
// that it is the check of the context, too, that each long step begins with.
func Point(ctx context.Context, step string) error {
	if everywhere != nil {
		if err := everywhere(step); err != nil {
			return err
		}
	}
	if h, ok := ctx.Value(hookKey{}).(Hook); ok {
		if err := h(step); err != nil {
			return err
		}
	}
	return ctx.Err()
}
