package drivers

import "context"

// Examiner is a driver with more than layers on the disk or in the kernel that can be
// wrong: a pool, devices.
type Examiner interface {
	// Examine returns what is wrong with it, and with Repair puts right what can be
	// without losing anything. It may run while others work: what they are changing is
	// left out, and what a living process uses is not touched. The error is that of the
	// examination itself.
	Examine(ctx context.Context, o ExamineOptions) ([]Finding, error)
}

// ExamineOptions say what Examine does beside looking.
type ExamineOptions struct {
	Repair bool
	// Note, if not nil, is told what was not looked at, and why.
	Note func(text string)
}

// Fault is a kind of finding.
type Fault string

// What Examine finds.
const (
	StorageState   Fault = "storage-state"   // what layers are kept in refuses work, or has no room
	StorageDamaged Fault = "storage-damaged" // its parts do not agree
	StorageLeaked  Fault = "storage-leaked"  // space of it that nobody has, and nobody gets
	StrayStorage   Fault = "stray-storage"   // a part of it that no layer has
	OrphanDevice   Fault = "orphan-device"   // the kernel keeps a device that no layer has
)

// Finding is one thing that is not as it should be.
type Finding struct {
	Fault      Fault
	Object     string // what it is about, without the driver's name
	Detail     string
	Done       string // how it was repaired; "": it was not
	Suggestion string // what a person can do where it was not
}
