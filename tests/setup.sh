#!/bin/bash
# setup.sh: what `make demo` and `make test` need of the machine.
#
# On Debian and Ubuntu, as root, what is missing is installed; otherwise it is named, with the command that installs
# it. A machine that has everything is left alone and nothing is downloaded.
set -euo pipefail
export PATH=$PATH:/usr/sbin:/sbin

# What is looked for, and the package that has it.
wanted=(
  qemu-system-x86_64:qemu-system-x86 dropbear:dropbear-bin ssh:openssh-client curl:curl ip:iproute2 ss:iproute2
  ping:iputils-ping dig:bind9-dnsutils gcc:gcc setpriv:util-linux python3:python3 rootlesskit:rootlesskit newuidmap:uidmap
  dnsperf:dnsperf dhclient:isc-dhcp-client dhcpcd:dhcpcd-base perfdhcp:kea-admin
  tmux:tmux mksquashfs:squashfs-tools xorriso:xorriso grub-mkrescue:grub-common mformat:mtools qemu-img:qemu-utils sfdisk:fdisk
  qemu-system-aarch64:qemu-system-arm tshark:tshark
  traceroute:traceroute rdisc6:ndisc6 iperf3:iperf3 nft:nftables iptables:iptables sshd:openssh-server
)
packages=()
for pair in "${wanted[@]}"; do
  command -v "${pair%%:*}" > /dev/null || packages+=("${pair##*:}")
done
# The guest needs a busybox without shared libraries, and Rust a C library to link with.
busybox=$(command -v busybox || true)
if [ -z "$busybox" ] || ldd "$busybox" > /dev/null 2>&1; then packages+=(busybox-static); fi
[ -e /usr/include/stdlib.h ] || packages+=(libc6-dev)
[ -e /usr/lib/grub/i386-pc ] || packages+=(grub-pc-bin)
[ -e /usr/lib/grub/x86_64-efi ] || packages+=(grub-efi-amd64-bin)
[ -e /usr/share/OVMF ] || packages+=(ovmf)
[ -e /etc/ssl/certs/ca-certificates.crt ] || packages+=(ca-certificates)

if [ ${#packages[@]} -gt 0 ]; then
  mapfile -t packages < <(printf '%s\n' "${packages[@]}" | sort -u)
  if ! command -v apt-get > /dev/null; then
    echo "setup: missing: ${packages[*]} (Debian's names): install them with this system's package manager" >&2; exit 1
  elif [ "$(id -u)" != 0 ]; then
    echo "setup: missing: sudo apt-get install --no-install-recommends ${packages[*]}" >&2; exit 1
  fi
  echo "setup: installing ${packages[*]}"
  log=$(mktemp); trap 'rm -f "$log"' EXIT
  export DEBIAN_FRONTEND=noninteractive
  { apt-get -q update && apt-get -qy install --no-install-recommends "${packages[@]}"; } > "$log" 2>&1 \
    || { tail -20 "$log" >&2; echo "setup: apt-get failed (above)" >&2; exit 1; }
fi

# The guest's kernel comes by apt-get download, which needs apt's lists.
if command -v apt-cache > /dev/null && [ "$(id -u)" = 0 ] \
  && ! apt-cache show linux-image-cloud-amd64 linux-image-virtual 2> /dev/null | grep -q .; then
  echo "setup: apt-get update"
  apt-get -qq update
fi

# The DNS test asks a real systemd-resolved. Where the host has none it is unpacked and not installed: its package would
# take the host's resolv.conf.
root=$(cd "$(dirname "$0")/.." && pwd)
unpacked=${CARGO_TARGET_DIR:-$root/target}/tests
if [ ! -e /lib/systemd/systemd-resolved ] && [ ! -e "$unpacked/lib/systemd/systemd-resolved" ] \
  && command -v apt-get > /dev/null; then
  mkdir -p "$unpacked/debs"
  if (cd "$unpacked/debs" && apt-get -q -o APT::Sandbox::User=root download systemd-resolved > log 2>&1); then
    dpkg -x "$unpacked"/debs/systemd-resolved_*.deb "$unpacked"
    # Where /lib is /usr/lib, packages may say either.
    [ -e "$unpacked/lib" ] || ln -s usr/lib "$unpacked/lib"
  else
    echo "setup: no systemd-resolved from apt: its test is skipped" >&2
  fi
fi

# Rust is not taken from apt: stable Debian's is too old.
need=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$(dirname "$0")/../Cargo.toml" | head -1)
if ! command -v cargo > /dev/null; then
  echo "setup: Rust is missing: install $need or newer with rustup" >&2; exit 1
fi
have=$(cd / && rustc --version | cut -d' ' -f2)
if [ "$(printf '%s\n' "$need" "$have" | sort -V | head -1)" != "$need" ]; then
  echo "setup: Rust $have is too old: $need or newer is needed (rustup update)" >&2; exit 1
fi
