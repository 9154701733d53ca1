#!/bin/bash
# build.sh [FILE]   (default: target/guest/portway-agent)
#
# Builds the agent as one static, stripped file that runs in any guest of this architecture, and fails where it is neither
# static nor below 3 MB. TRIPLE names another target, such as aarch64-unknown-linux-musl.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
target=${CARGO_TARGET_DIR:-$root/target}
file=${1:-$target/guest/portway-agent}
triple=${TRIPLE:-$(uname -m)-unknown-linux-gnu}
most=3000000

die() { echo "guest-agent/build.sh: $*" >&2; exit 1; }

(cd "$root" && RUSTFLAGS="-C target-feature=+crt-static -C strip=symbols" \
  cargo build --quiet --locked --release --package portway-agent --target "$triple" --target-dir "$target")
mkdir -p "$(dirname "$file")"
cp "$target/$triple/release/portway-agent" "$file.new"
ldd "$file.new" 2>&1 | grep -qE 'statically linked|not a dynamic' || die "$file.new is not static"
size=$(stat -c %s "$file.new")
[ "$size" -lt "$most" ] || die "$file.new has $size bytes, $most are too many"
mv "$file.new" "$file"
echo "agent: $file, $size bytes, static"
