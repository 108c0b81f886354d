#!/bin/sh
# Process 1 of the guest, out of the initramfs: modules, then the host's root with the package layer and a tmpfs over
# it, then the second stage in there. Busybox by full name: its shell would otherwise prefer its own applets later on.
b=/bin/busybox
$b mount -t proc proc /proc
$b mount -t sysfs sysfs /sys
$b mount -t devtmpfs dev /dev
for module in /modules/*.ko; do
  $b insmod "$module" || echo "cannot load $module"
done
share=trans=virtio,version=9p2000.L,msize=1048576
$b mount -t 9p -o $share,ro,cache=loose host /host || $b poweroff -f
$b mount -t 9p -o $share,ro,cache=loose layer /layer || $b poweroff -f
$b mount -t tmpfs -o mode=755,size=50% tmpfs /writable
$b mkdir /writable/upper /writable/work
$b mount -t overlay -o lowerdir=/layer:/host,upperdir=/writable/upper,workdir=/writable/work overlay /root ||
  $b poweroff -f
$b mount -t devtmpfs dev /root/dev
$b mount -t proc proc /root/proc
$b mount -t sysfs sysfs /root/sys
$b mkdir -p /root/dev/shm /root/dev/pts
$b mount -t tmpfs tmpfs /root/dev/shm
$b mount -t devpts devpts /root/dev/pts
$b mount -t tmpfs tmpfs /root/run
$b mkdir -p /root/run/control
$b mount -t 9p -o $share,cache=none control /root/run/control || $b poweroff -f
$b chroot /root /bin/bash /run/control/setup
$b sync
$b poweroff -f
