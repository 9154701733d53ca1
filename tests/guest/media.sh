#!/bin/bash
# media.sh PREFIX DIR
#
# Makes from the guest of build.sh (PREFIX) the other forms an image can have, as `linuxkit build` names them:
#   DIR/squash-kernel, -squashfs.img, -cmdline   the same root as a squashfs
#   DIR/squash-stage1.img                        an initrd that mounts it: this kernel has squashfs in a module
#   DIR/os.iso                                   a CD for BIOS and UEFI
#   DIR/disk.qcow2                               a disk for BIOS with the same content
#   DIR/efi.img                                  a raw disk that only UEFI boots: a GPT with an EFI system partition
# Needs mksquashfs, xorriso, grub-mkrescue, mtools, qemu-img, sfdisk (tests/setup.sh).
set -euo pipefail
umask 022
export PATH=$PATH:/usr/sbin:/sbin
prefix=$(realpath -m "$1"); dir=$2
die() { echo "media.sh: $*" >&2; exit 1; }
for tool in mksquashfs:squashfs-tools xorriso:xorriso grub-mkrescue:grub-common mformat:mtools qemu-img:qemu-utils sfdisk:fdisk; do
  command -v "${tool%%:*}" > /dev/null || die "${tool%%:*} is missing: apt-get install ${tool##*:}"
done
mkdir -p "$dir"; dir=$(cd "$dir" && pwd)
# Several tests may want them at once; what is newer than the guest is good.
exec 9> "$dir/lock"; flock 9
[ ! "$dir/complete" -nt "$prefix-initrd.img" ] || exit 0
work=$(mktemp -d "$dir/work.XXXXXX"); trap 'rm -rf "$work"' EXIT

# --- squashfs and the initrd before it --------------------------------------------------------------------------
root=$work/root
mkdir "$root"
(cd "$root" && gzip -dc "$prefix-initrd.img" | busybox cpio -idm 2> /dev/null)
packages=$(dirname "$prefix")/packages
early=$work/early
mkdir -p "$early"/{bin,dev,proc,newroot,lib}
cp "$root/bin/busybox" "$early/bin/busybox"
add_module() { # NAME
  local file to=$early/lib/$1.ko needed
  [ ! -e "$to" ] || return 0
  file=$(find "$packages" -name "$1.ko" -o -name "$1.ko.xz" -o -name "$1.ko.zst" | head -1)
  case $file in
    '') return 0 ;;
    *.xz) busybox unxz -c "$file" > "$to" ;;
    *.zst) zstd -qdc "$file" > "$to" ;;
    *) cp "$file" "$to" ;;
  esac
  for needed in $(tr '\0' '\n' < "$to" | sed -n 's/^depends=//p' | tr ',' ' '); do add_module "$needed"; done
  echo "/bin/busybox insmod /lib/$1.ko" >> "$work/insmods"
}
for module in virtio_pci virtio_blk squashfs; do add_module $module; done
{
  echo '#!/bin/busybox sh'
  echo '/bin/busybox mount -t devtmpfs dev /dev'
  cat "$work/insmods"
  echo 'while [ ! -b /dev/vda ]; do /bin/busybox sleep 0.1; done'
  echo '/bin/busybox mount -t squashfs -o ro /dev/vda /newroot'
  echo '/bin/busybox umount /dev'
  echo 'exec /bin/busybox switch_root /newroot /init'
} > "$early/init"
chmod 755 "$early/init"
(cd "$early" && find . | busybox cpio -o -H newc -R 0:0 2> /dev/null | gzip -1) > "$dir/squash-stage1.img"
ln -sf /run/resolv.conf "$root/etc/resolv.conf"
rm -f "$dir/squash-squashfs.img"
mksquashfs "$root" "$dir/squash-squashfs.img" -all-root -comp gzip -Xcompression-level 1 -no-progress -quiet > /dev/null
cp "$prefix-kernel" "$dir/squash-kernel"
echo 'console=ttyS0 quiet no_timer_check' > "$dir/squash-cmdline"

# --- the CD, and the disk: grub-mkrescue's image is both -------------------------------------------------------
cd=$work/cd
mkdir -p "$cd/boot/grub"
cp "$prefix-kernel" "$cd/kernel"; cp "$prefix-initrd.img" "$cd/initrd.img"
cat > "$cd/boot/grub/grub.cfg" <<'END'
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
set timeout=0
menuentry portway {
  linux /kernel console=ttyS0 quiet no_timer_check
  initrd /initrd.img
}
END
grub-mkrescue -o "$dir/os.iso" "$cd" > "$work/log" 2>&1 || { tail -5 "$work/log" >&2; die "grub-mkrescue failed (above)"; }
qemu-img convert -q -O qcow2 "$dir/os.iso" "$dir/disk.qcow2"

# --- the EFI disk -----------------------------------------------------------------------------------------------
cat > "$work/efi.cfg" <<'END'
serial --unit=0 --speed=115200
terminal_input serial console
terminal_output serial console
search --no-floppy --set=root --file /kernel
linux /kernel console=ttyS0 quiet no_timer_check
initrd /initrd.img
boot
END
grub-mkstandalone -O x86_64-efi -o "$work/BOOTX64.EFI" --modules="part_gpt fat serial search search_fs_file linux" \
  --install-modules="part_gpt fat serial search search_fs_file linux normal configfile" --locales= --fonts= --themes= \
  "boot/grub/grub.cfg=$work/efi.cfg" > "$work/log" 2>&1 || { tail -5 "$work/log" >&2; die "grub-mkstandalone failed (above)"; }
mib=48
truncate -s "$((mib - 2))M" "$work/esp"
mformat -i "$work/esp" -F ::
mmd -i "$work/esp" ::/EFI ::/EFI/BOOT
mcopy -i "$work/esp" "$work/BOOTX64.EFI" ::/EFI/BOOT/BOOTX64.EFI
mcopy -i "$work/esp" "$prefix-kernel" ::/kernel
mcopy -i "$work/esp" "$prefix-initrd.img" ::/initrd.img
truncate -s "${mib}M" "$work/disk"
sfdisk -q "$work/disk" <<< "label: gpt
start=2048, size=$(((mib - 2) * 2048)), type=C12A7328-F81F-11D2-BA4B-00A0C93EC93B"
dd if="$work/esp" of="$work/disk" bs=1M seek=1 conv=notrunc,sparse status=none
mv "$work/disk" "$dir/efi.img"
touch "$dir/complete"
