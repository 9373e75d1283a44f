# Run first in the guest with SELinux (labelled.py): TREE, the directory of its Python packages, the root of a
# policy store, and what is to be made with it ("": nothing). Installs kbusd as a package of it would, loads the
# policy, and labels what is new.
# Not enforced yet: that is for who comes next.
set -e
tree=$1 packages=$2 store=$3 install=$4
mkdir -p "$tree"
mount -t hostfs -o "$tree" tree "$tree"

place=/usr/lib/python3/dist-packages
for each in msgspec prctl.py _prctl pyseccomp.py jeepney; do
    cp -r --preserve=timestamps "$packages/$each"* $place/
done
cp -r --preserve=timestamps "$tree/kbusd" $place/
mkdir -p /usr/share/kbusd
cp -r --preserve=timestamps "$tree/profiles" /usr/share/kbusd/
for command in kbusd:kbusd.main kbusctl:kbusd.ctl.main; do
    file=/usr/bin/${command%%:*}
    printf '#!/usr/bin/python3\nfrom sys import exit\nfrom %s import main\nexit(main())\n' \
        "${command#*:}" >"$file"
    chmod 755 "$file"
done
python3 -m compileall -q -l $place || true
echo "root:*:20000::::::" >/etc/shadow
mkdir -p /run/kbusd /run/dbus /etc/kbusd

rm -rf /etc/selinux
cp -r --preserve=timestamps "$store/etc/selinux" /etc/
python3 -c '
import glob
(policy,) = glob.glob("/etc/selinux/default/policy/policy.*")
with open("/sys/fs/selinux/load", "wb", buffering=0) as file:
    file.write(open(policy, "rb").read())
'
if [ "$install" ]; then # as docs/selinux.md tells the admin
    cp -r --preserve=timestamps "$store/var/lib/selinux" /var/lib/
    cp -r --preserve=timestamps "$tree/selinux" /root/
    make -sC /root/selinux clean "$install"
fi
restorecon -RF $place /usr/share/kbusd /usr/bin/kbusd /usr/bin/kbusctl /run /etc/kbusd /etc/shadow /etc/selinux /dev
