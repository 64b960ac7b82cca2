// Package service is a store as containerd's services: views as the snapshots v1
// API, the store as the diff v1 API. Requests are served by containerd's own code
// (contrib/snapshotservice, contrib/diffservice) over a snapshot.View and a Differ;
// what this package adds is which view a request means, who may ask, and bounds on
// what is asked for.
//
// It opens no store and no socket, and knows no configuration: cmd/layerd does.
//
// # Life cycle
//
//	New -> Server --Serve (one per socket)--> Drain -> gone
//
// Drain lets the calls at work end, for as long as its context lets it; then they
// are cancelled, and leave what the store's calls leave when they are cancelled.
//
// # Which view
//
// A client of several views names one in each request, in the field snapshotter:
// containerd puts the name of the proxy plugin there. A Server with Only set serves
// that view, whatever the field says.
//
// # Diff
//
// Requests of the diff API carry mounts. snapshot.Store.Owner maps them back to
// layers, and none of their paths is followed. Mounts that are not the store's are
// ErrNotImplemented, on which containerd asks its next differ. Content is read from and written to
// the client's containerd, in the namespace and under the lease of the request; a
// request that brings no lease gets one that expires, since a blob that nothing
// names yet would be garbage.
//
// A layer that was prepared without a parent, to get one at Commit (containerd's
// parallel unpack), is known by its mounts, too, and gets its whiteouts in the
// driver's form. No other differ can do that: once mounts are ours, Apply fails
// rather than hand such a layer on.
package service
