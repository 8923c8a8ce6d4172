#!/bin/busybox sh
# The guest's init: puts an overlay over the host's root, runs /job there and says on the virtio port how it ended.
# /settings gives: mark (a word only the host knows), repo, modules (both paths of the host).
b=/bin/busybox
fail() { echo "fimbria-init: $1" >&2; $b poweroff -f; }

$b mount -t proc none /proc
$b mount -t sysfs none /sys
$b mount -t devtmpfs none /dev
. /settings
for m in /modules/*; do $b insmod "$m" || fail "can't load $m"; done

$b mount -t virtiofs -o ro root /host || fail "can't mount the host's root"
$b mount -t tmpfs none /upper && $b mkdir /upper/up /upper/work
$b mount -t overlay -o lowerdir=/host,upperdir=/upper/up,workdir=/upper/work none /new || fail "can't mount the overlay"

# The repository may lie below one of the directories that are about to be covered.
$b mount -o bind "/new$repo" /repo || fail "the host has no $repo"
release=$($b uname -r)
$b mkdir -p "/new/lib/modules/$release"
$b mount -o bind "/host$modules" "/new/lib/modules/$release" || fail "the host has no $modules"
$b mount -t tmpfs -o mode=755 none /new/run
$b mount -t tmpfs -o mode=1777 none /new/tmp
$b mkdir -p "/new$repo" && $b mount --move /repo "/new$repo"
$b mount --move /proc /new/proc
$b mount --move /sys /new/sys
$b mount --move /dev /new/dev
$b mkdir -p /new/dev/pts /new/dev/shm /new/run/lock
$b mount -t devpts -o mode=620,ptmxmode=666 none /new/dev/pts
$b mount -t tmpfs -o mode=1777 none /new/dev/shm
$b mount -t cgroup2 none /new/sys/fs/cgroup || fail "no cgroup2"
$b mount -t bpf -o mode=700 none /new/sys/fs/bpf || fail "no bpffs"
$b mount -t tracefs none /new/sys/kernel/tracing || fail "no tracefs"
$b mount -t debugfs none /new/sys/kernel/debug
for link in fd:/proc/self/fd stdin:/proc/self/fd/0 stdout:/proc/self/fd/1 stderr:/proc/self/fd/2; do
  $b ln -sf "${link#*:}" "/new/dev/${link%%:*}"
done
$b ip link set lo up
$b hostname fimbria-vm

port=
for p in /new/sys/class/virtio-ports/*; do
  [ "$($b cat "$p/name")" = fimbria ] && port=/dev/${p##*/}
done
[ -n "$port" ] || fail "no virtio port to answer on"

# Through a pipe, so that the job may open /dev/stdout again: the port itself can be opened only once.
$b cp /bin/busybox /job /new/run/
$b mkfifo /new/run/out
$b cat >/new/run/pid1 <<PID1
b=/run/busybox
\$b cat /run/out >$port &
ulimit -n 65536
exec 3>/run/out
echo "$mark GUEST_READY" >&3
/bin/sh /run/job </dev/null >&3 2>&1 3>&-
echo "
$mark GUEST_RC=\$?" >&3
exec 3>&-
wait
\$b poweroff -f
PID1
exec $b switch_root /new /run/busybox sh /run/pid1 || fail "switch_root failed"
