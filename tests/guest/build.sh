#!/bin/bash
# build.sh [PREFIX]   (default: target/guest/demo)
#
# Makes the guest of `make demo` and of the VM test, in LinuxKit's three files:
#   PREFIX-kernel       the cloud kernel of this host's distribution, from its package
#   PREFIX-initrd.img   busybox, dropbear, portway-agent as /init, guest-probe, the kernel modules they need
#   PREFIX-cmdline      the kernel's command line
# Beside them: id_ed25519, the key that may log in as root, known_hosts for ports 2222 and any other, and ipxe.lkrn,
# iPXE as a kernel, for a guest that boots from the network.
#
# Needs no root: only cargo, apt-get download, dpkg, ssh-keygen, a static busybox and dropbear. The kernel package is
# fetched once; the rest is quick and made anew, so the guest always has the agent of this tree.
set -euo pipefail
umask 022
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
prefix=${1:-$target/guest/demo}
mkdir -p "$(dirname "$prefix")"
dir=$(cd "$(dirname "$prefix")" && pwd)
prefix=$dir/$(basename "$prefix")
triple=x86_64-unknown-linux-gnu

say() { echo "guest: $*"; }
die() { echo "build.sh: $*" >&2; exit 1; }
need() { command -v "$1" || { [ -x "/usr/sbin/$1" ] && echo "/usr/sbin/$1"; } || die "$1 is missing: apt-get install $2"; }

[ "$(uname -m)" = x86_64 ] || die "the guest is built for x86_64 only, this machine is $(uname -m)"
busybox=$(need busybox busybox-static)
if ldd "$busybox" > /dev/null 2>&1; then die "$busybox is not static: apt-get install busybox-static"; fi
dropbear=$(need dropbear dropbear-bin)
dropbearkey=$(need dropbearkey dropbear-bin)
dhclient=$(need dhclient isc-dhcp-client)
need ssh-keygen openssh-client > /dev/null

# --- the kernel, once -------------------------------------------------------------------------------------------
packages=$dir/packages
if [ ! -e "$packages/complete" ]; then
  rm -rf "$packages"; mkdir -p "$packages/debs"
  image=
  # Debian's kernel for VMs; Ubuntu's. Both are empty packages that depend on the current version.
  for meta in linux-image-cloud-amd64 linux-image-virtual; do
    image=$(apt-cache depends --important "$meta" 2> /dev/null | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -1)
    [ -z "$image" ] || break
  done
  [ -n "$image" ] || die "apt knows no kernel for VMs (linux-image-cloud-amd64): run apt-get update as root"
  # Ubuntu keeps the modules in a package of their own.
  modules=linux-modules-${image#linux-image-}
  for package in "$image" "$modules"; do
    apt-cache show "$package" > /dev/null 2>&1 || { [ "$package" = "$modules" ] && continue; }
    say "downloading $package"
    # _apt cannot write here, and says so in a warning nobody needs; errors are kept.
    (cd "$packages/debs" && apt-get -q -o APT::Sandbox::User=root download "$package" > ../log 2>&1) \
      || { cat "$packages/log" >&2; die "cannot download $package: run apt-get update as root"; }
    dpkg -x "$packages/debs/$package"_*.deb "$packages"
  done
  rm -rf "$packages/debs"
  touch "$packages/complete"
fi
if [ ! -e "$dir/ipxe.lkrn" ]; then
  mkdir -p "$packages/ipxe"
  (cd "$packages/ipxe" && apt-get -q -o APT::Sandbox::User=root download ipxe > ../log 2>&1) \
    || { cat "$packages/log" >&2; die "cannot download ipxe: run apt-get update as root"; }
  dpkg -x "$packages/ipxe"/ipxe_*.deb "$packages/ipxe"
  cp "$(find "$packages/ipxe" -name ipxe.lkrn | head -1)" "$dir/ipxe.lkrn"
fi
kernel=$(find "$packages/boot" -name 'vmlinuz-*' | head -1)
[ -n "$kernel" ] || die "no kernel in $packages: remove that directory and try again"

# --- our binaries, static ---------------------------------------------------------------------------------------
say "building portway-agent and guest-probe"
"$root/guest-agent/build.sh" "$target/guest/portway-agent"
agent=$target/guest/portway-agent
probe=$dir/guest-probe
if [ ! "$probe" -nt "$root/tests/src/bin/guest-probe.rs" ]; then
  rustc --edition 2024 --crate-name guest_probe -O -C strip=symbols -C target-feature=+crt-static --target $triple \
    -o "$probe" "$root/tests/src/bin/guest-probe.rs"
fi
ldd "$probe" 2>&1 | grep -qE 'statically linked|not a dynamic' || die "$probe is not static"

# --- keys, once -------------------------------------------------------------------------------------------------
key=$dir/id_ed25519
[ -e "$key" ] || ssh-keygen -q -t ed25519 -N '' -C portway-guest -f "$key"
[ -e "$dir/host_key" ] || "$dropbearkey" -t ed25519 -f "$dir/host_key" > /dev/null 2>&1
# A host key is the same for every port, so the name has none: see HostKeyAlias in demo.sh.
echo "portway-guest $("$dropbearkey" -y -f "$dir/host_key" | grep '^ssh-')" > "$dir/known_hosts"

# --- the root file system ---------------------------------------------------------------------------------------
r=$(mktemp -d "$dir/root.XXXXXX"); trap 'rm -rf "$r"' EXIT
chmod 755 "$r"
mkdir -p "$r"/{bin,dev,proc,sys,run,tmp,root/.ssh,lib/modules,www/cgi-bin} "$r"/etc/{portway,dropbear} "$r/usr/share/udhcpc"
ln -s bin "$r/sbin"
cp "$busybox" "$r/bin/busybox"
for applet in $("$busybox" --list); do [ -e "$r/bin/$applet" ] || ln -s busybox "$r/bin/$applet"; done
cp "$probe" "$r/bin/guest-probe"
cp "$agent" "$r/init"
ln -s ../init "$r/bin/portway-agent"

# dhclient is for DHCPv6, which busybox may not have.
cp "$dropbear" "$r/bin/dropbear"; cp "$dhclient" "$r/bin/dhclient"
# Shared libraries at the paths the loader will look for them.
{ ldd "$dropbear"; ldd "$dhclient"; } | grep -oE '/[^ ]+' | sort -u | while read -r library; do
  mkdir -p "$r$(dirname "$library")"; cp -L "$library" "$r$library"
done
cp "$dir/host_key" "$r/etc/dropbear/host_key"
# The builder's own keys too, so that plain `ssh -p 2222 root@localhost` works for who has one.
cat "$key.pub" "${HOME:-/nonexistent}"/.ssh/id_*.pub 2> /dev/null > "$r/root/.ssh/authorized_keys" || true
chmod 700 "$r/root" "$r/root/.ssh"; chmod 600 "$r/root/.ssh/authorized_keys" "$r/etc/dropbear/host_key"

echo 'root:x:0:0:root:/root:/bin/sh' > "$r/etc/passwd"
echo 'root:*:19000:0:99999:7:::' > "$r/etc/shadow"; chmod 600 "$r/etc/shadow"
printf 'root:x:0:\ntty:x:5:\n' > "$r/etc/group"
echo /bin/sh > "$r/etc/shells"
echo 'hosts: files dns' > "$r/etc/nsswitch.conf"
echo '127.0.0.1 localhost' > "$r/etc/hosts"
install -m 755 "$here/udhcpc.sh" "$r/usr/share/udhcpc/default.script"
install -m 755 "$here/console.sh" "$r/etc/portway/console"
install -m 755 "$here/answer.cgi" "$r/www/cgi-bin/guest"
install -m 644 "$here/services" "$r/etc/portway/services"
install -m 644 "$here/agent" "$r/etc/portway/agent"
# busybox's own default path, by its build.
mkdir -p "$r/etc/udhcpc"; ln -s /usr/share/udhcpc/default.script "$r/etc/udhcpc/default.script"
echo '<a href="/cgi-bin/guest">ask the guest</a>' > "$r/www/index.html"

# Modules, each after those it needs, which is what /etc/portway/modules wants; what the kernel has built in has no
# file. evdev and button are for the power button.
add_module() { # NAME
  local file to=$r/lib/modules/$1.ko needed
  [ ! -e "$to" ] || return 0
  file=$(find "$packages" -name "$1.ko" -o -name "$1.ko.xz" -o -name "$1.ko.zst" | head -1)
  case $file in
    '') return 0 ;;
    *.xz) "$busybox" unxz -c "$file" > "$to" ;;
    *.zst) command -v zstd > /dev/null || die "zstd is missing: apt-get install zstd"; zstd -qdc "$file" > "$to" ;;
    *) cp "$file" "$to" ;;
  esac
  for needed in $(tr '\0' '\n' < "$to" | sed -n 's/^depends=//p' | tr ',' ' '); do add_module "$needed"; done
  echo "/lib/modules/$1.ko" >> "$r/etc/portway/modules"
}
# Disks, CDs with metadata, shares, Ignition's configuration: what `portway run` can give a guest.
# The agent sees listeners by tcp_diag and udp_diag.
for module in virtio_pci virtio_net vmw_vsock_virtio_transport tcp_diag udp_diag af_packet evdev button \
  virtio_blk virtio_scsi sr_mod isofs virtiofs qemu_fw_cfg; do
  add_module $module
done

# --- the three files --------------------------------------------------------------------------------------------
(cd "$r" && find . | "$busybox" cpio -o -H newc -R 0:0 2> /dev/null | gzip -1) > "$prefix-initrd.img.new"
mv "$prefix-initrd.img.new" "$prefix-initrd.img"
cp "$kernel" "$prefix-kernel"
# no_timer_check: on a busy machine TCG's timer is late, and the kernel would panic over it.
echo 'console=ttyS0 quiet no_timer_check' > "$prefix-cmdline"
say "made $prefix-{kernel,initrd.img,cmdline} ($(du -h "$prefix-initrd.img" | cut -f1) initrd, ${kernel##*/vmlinuz-})"
