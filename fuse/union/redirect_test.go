package union

import "testing"

// A directory of the lowers that was moved into a new one was empty after the next
// mount: the new directory merges with nothing, and so the redirect was not followed.
func TestDirMovedIntoNewDirIsEmptyAfterMount(t *testing.T) {
	both(t, 2, Config{Redirect: RedirectOn}, plainLowers(t), func(s side, say func(string, ...any)) {
		say("mkdir %s", errno(s.mkdir("new", 0o755)))
		say("mkdir below %s", errno(s.mkdir("new/er", 0o755)))
		say("rename %s", errno(s.rename("d", "new/er/d", 0)))
		say("rename within %s", errno(s.rename("new/er/d/sub", "new/er/sub", 0)))
	})
}
