#!/bin/sh
# The first process in the guest. Its root is the host's, read-only; it lays a tmpfs over that, so
# that everything can be written and nothing reaches the host, or takes the first disk ($KBUSD_IMAGE),
# and runs $KBUSD_GUEST/job there.
# $KBUSD_GUEST, from the kernel's command line, is the one directory that is shared with the host.
# If a step fails, this ends, and with it the guest: a kernel does not survive its first process.
set -e
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin

mount -t proc proc /proc
# Before another file system becomes the root: LoadPin takes modules from the first one only.
modules=/usr/lib/uml/modules/$(uname -r)/kernel
for module in fs/fuse/fuse fs/fuse/cuse fs/overlayfs/overlay net/unix/unix_diag; do
    insmod "$modules/$module.ko"
done

mount -t tmpfs -o mode=755 over /mnt
mkdir /mnt/upper /mnt/work /mnt/root
if [ "$KBUSD_IMAGE" ]; then
    mkdir /mnt/dev
    mount -t devtmpfs devtmpfs /mnt/dev
    mount -t ext4 /mnt/dev/ubda /mnt/root
    umount /mnt/dev
else
    mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work root /mnt/root
fi
cd /mnt/root
pivot_root . mnt
mount -t proc proc /proc
umount -l /mnt

mount -t sysfs sysfs /sys
mount -t securityfs securityfs /sys/kernel/security
mount -t selinuxfs selinuxfs /sys/fs/selinux
mount -t devtmpfs devtmpfs /dev
mkdir /dev/pts /dev/shm
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t tmpfs -o mode=755 run /run
mkdir -m 1777 /run/lock
chmod 666 /dev/fuse # as udev's rule has it
mkdir -p "$KBUSD_GUEST"
mount -t hostfs -o "$KBUSD_GUEST" shared "$KBUSD_GUEST"

echo guest >/proc/sys/kernel/hostname
echo 0 >/proc/sys/kernel/printk_ratelimit # or the kernel drops refusals that a test looks for

/bin/sh "$KBUSD_GUEST/job" || echo "the job ended with status $?"
sync
echo o >/proc/sysrq-trigger
# Powering off is another thread's work; when it is done, nothing is left to return to.
sleep 60
