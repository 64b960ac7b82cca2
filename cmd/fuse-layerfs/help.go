package main

const help = `Usage: fuse-layerfs [-f|-d] [-o OPTIONS] [SOURCE] MOUNTPOINT

Mounts a union of directories as the kernel's overlayfs does, through FUSE. Its
uppers are overlayfs's: either mounts what the other wrote.

  -f          stay in the foreground
  -d          the same, and print every request
  -o OPTIONS  options between commas, a comma in one as \,
  -h, -V      this text; the version

Layers
  lowerdir=A:B::D     read-only layers, the nearest first; behind :: for data only;
                      a colon in a name as \:; lowerdir+=A and datadir+=D add one
  upperdir=U          the writable layer; without it the mount is read-only
  workdir=W           an empty directory on the file system of U
  redirect_dir=on|off|follow|nofollow    renamed directories (on; with userxattr the
                      kernel's overlayfs cannot read them)
  metacopy=0|1        copy up metadata alone where that is enough (0)
  index=0|1           keep hard links over copy-up (0)
  nfs_export=0|1      file handles that last (0)
  userxattr           user.overlay.* instead of trusted.overlay.*
  volatile, fsync=0   flush nothing; a crash may lose the upper
  aufs_whiteouts=0|1  honour .wh. files (1)

Owners and permissions
  uidmapping=H:S:N[:...], gidmapping=   ids H.. of the layers are shown as S..
  squash_to_root, squash_to_uid=N, squash_to_gid=N    one owner for everything
  xattr_permissions=0|1|2   owner and mode in the inode, or in an xattr
  noacl, noxattrs=1         without POSIX ACLs; without any xattrs
  static_nlink              directories show one link

Serving
  passthrough=a|b|c|off   what the kernel reads and writes without the server: upper
                          files (a, as root on Linux 6.9); lower ones too (b); on a
                          read-only mount all (c)
  writeback=0|1           else: whether the kernel collects writes (1)
  timeout=SECONDS         how long the kernel keeps names and attributes (a day)
  threaded=0|1, max_threads=N, max_idle_threads=N
  log=FILE                messages, which the foreground prints

mount(8)'s and libfuse's own options work, too: ro, dev, nosuid, noexec, atime
flags, fsname=, allow_other and so on. Unknown options are ignored with a warning.
SIGUSR1 prints counts (in the background to log=FILE alone), SIGTERM unmounts.
`
