package union

import "github.com/layerctl/layerctl/internal/kprobe"

// abilities is what upper's file system lets this process do. Unknown counts as
// no wherever there is another way.
type abilities struct {
	devices        kprobe.Answer // mknod 0/0: whiteouts
	renameWhiteout kprobe.Answer // RENAME_WHITEOUT
	exchange       kprobe.Answer // RENAME_EXCHANGE
	trusted        kprobe.Answer // trusted.* xattrs
	user           kprobe.Answer // user.* xattrs
	tmpfile        kprobe.Answer // O_TMPFILE, and a link of it
	clone          kprobe.Answer // FICLONE
	handles        kprobe.Answer // name_to_handle_at, and opening by it
	types          kprobe.Answer // d_type
}
