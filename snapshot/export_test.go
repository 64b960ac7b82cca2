package snapshot

import "context"

// Batches returns how many write transactions the database has made.
func (s *Store) Batches() int {
	s.db.group.mu.Lock()
	defer s.db.group.mu.Unlock()
	return s.db.group.batches
}

// Pause keeps the database from being left by this Store until f returns.
func (s *Store) Pause(f func()) error {
	return s.db.view(context.Background(), func(*txn) error { f(); return nil })
}
