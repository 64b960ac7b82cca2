// This file is empty on purpose: without an assembly file the compiler refuses
// the bodiless declarations of nsexec.go, which name functions of the runtime.
