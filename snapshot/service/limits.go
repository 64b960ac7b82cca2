package service

import (
	"fmt"

	diffapi "github.com/containerd/containerd/api/services/diff/v1"
	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/errdefs"
)

// Limits bound what one client can ask for. A zero field is the default named
// beside it.
type Limits struct {
	Message int    // bytes of one message: 16 MiB, which is containerd's own
	Streams uint32 // calls at a time on one connection: 1,000
	Labels  int    // bytes of the labels of one snapshot, names and values: 1 MiB
	Label   int    // bytes of one label, name and value: 4,096, which is containerd's own
}

func (l Limits) orDefaults() Limits {
	set := func(v *int, to int) {
		if *v == 0 {
			*v = to
		}
	}
	set(&l.Message, 16<<20)
	set(&l.Labels, 1<<20)
	set(&l.Label, 4096)
	if l.Streams == 0 {
		l.Streams = 1000
	}
	return l
}

// check refuses a request that asks for too much, or lacks what containerd's code
// takes for granted; ErrInvalidArgument names the label, or what is missing.
func (l Limits) check(req any) error {
	switch r := req.(type) {
	case *snapshotsapi.PrepareSnapshotRequest:
		return l.checkLabels(r.Labels)
	case *snapshotsapi.ViewSnapshotRequest:
		return l.checkLabels(r.Labels)
	case *snapshotsapi.CommitSnapshotRequest:
		return l.checkLabels(r.Labels)
	case *snapshotsapi.UpdateSnapshotRequest:
		if r.Info == nil {
			return fmt.Errorf("update: no info given: %w", errdefs.ErrInvalidArgument)
		}
		return l.checkLabels(r.Info.Labels)
	case *diffapi.ApplyRequest:
		if r.Diff == nil {
			return fmt.Errorf("apply: no layer given: %w", errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

func (l Limits) checkLabels(labels map[string]string) error {
	total := 0
	for name, value := range labels {
		n := len(name) + len(value)
		if n > l.Label {
			return fmt.Errorf("label %.64q has %d bytes, %d are the most: %w", name, n, l.Label, errdefs.ErrInvalidArgument)
		}
		if total += n; total > l.Labels {
			return fmt.Errorf("%d labels of more than %d bytes: %w", len(labels), l.Labels, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}
