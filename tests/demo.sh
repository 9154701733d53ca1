#!/bin/bash
# demo.sh: a VM with Portway as its whole network, shown (make demo).
#
# Builds what is needed, boots the demo guest with `portway run -publish …`, shows that ssh and curl reach it through
# published ports and that it reaches a web server on this host by name. Then it stays up until Ctrl-C; with ONCE=1 it
# ends. SSH_PORT and WEB_PORT choose other host ports than 2222 and 8080.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/.." && pwd)
cd "$root"
export PATH=$PATH:/usr/sbin:/sbin
target=${CARGO_TARGET_DIR:-$root/target}
guest=$target/guest
ssh_port=${SSH_PORT:-2222} web_port=${WEB_PORT:-8080}

step() { printf '\n== %s\n' "$*"; }
die() { echo "demo: $*" >&2; exit 1; }
show() { printf '$ %s\n' "$*"; "$@" | sed 's/^/  /'; }

"$here/setup.sh"
for pair in "SSH_PORT $ssh_port 2223" "WEB_PORT $web_port 8081"; do
  read -r name port other <<< "$pair"
  owner=$(ss -Hltnp "sport = :$port" | head -1)
  [ -z "$owner" ] || die "port $port is taken (${owner##*users:}): end that, or choose another: $name=$other make demo"
done

step "Building portway"
cargo build --locked --release --package portway
portway=$target/release/portway
step "Making the guest"
"$here/guest/build.sh" "$guest/demo"

# A web server of this host, on its loopback and on a port nobody has.
mkdir -p "$guest/host-web"
echo "Hello from the host $(uname -n), which only its own loopback serves" > "$guest/host-web/index.html"
web_log=$guest/host-web.log
vm='' web=''
finish() {
  local code=$?
  trap - EXIT INT TERM
  if [ -n "$vm" ] && kill -TERM "$vm" 2> /dev/null; then
    step "Powering the VM off"
    wait "$vm" || code=$?
    tail -3 "$guest/console.log" | sed 's/^/  /'
  fi
  [ -z "$web" ] || kill "$web" 2> /dev/null || true
  exit $code
}
trap finish EXIT
trap 'exit 0' INT TERM
# -u: the line with the port comes at once.
setpriv --pdeathsig TERM python3 -u -m http.server --bind 127.0.0.1 --directory "$guest/host-web" 0 > "$web_log" 2>&1 &
web=$!

wait_for() { # FILE PATTERN SECONDS PID: until the pattern is in the file, or the process or the time ends
  local deadline=$((SECONDS + $3))
  until grep -q "$2" "$1" 2> /dev/null; do
    kill -0 "$4" 2> /dev/null || { tail -15 "$1" >&2; die "it ended (its last lines are above)"; }
    [ $SECONDS -lt $deadline ] || { tail -15 "$1" >&2; die "no \"$2\" within $3 s (the last lines are above)"; }
    sleep 0.1
  done
}
wait_for "$web_log" 'port [0-9]' 10 $web
host_port=$(sed -n 's/.*port \([0-9]*\).*/\1/p' "$web_log" | head -1)

step "Starting the VM"
run=("$portway" run -publish "$ssh_port:22/tcp" -publish "$web_port:80/tcp" --mem 512 "$guest/demo")
echo "$ ${run[*]}"
# In a session of its own, so that Ctrl-C here is ours to pass on; it goes when we go, however that happens.
setpriv --pdeathsig TERM setsid "${run[@]}" > "$guest/console.log" 2>&1 < /dev/null &
vm=$!
wait_for "$guest/console.log" 'portway-agent: ready' 120 $vm
grep -E '^portway: ' "$guest/console.log" | sed 's/^/  /'

login=(ssh -i "$guest/id_ed25519" -o IdentitiesOnly=yes -o HostKeyAlias=portway-guest
  -o "UserKnownHostsFile=$guest/known_hosts" -o BatchMode=yes -p "$ssh_port" root@localhost)
step "ssh to the published port $ssh_port"
show "${login[@]}" 'uname -nrs; ip -4 -o addr show eth0'
step "curl to the published port $web_port, answered from inside the guest"
show curl -fsS --max-time 20 "http://localhost:$web_port/cgi-bin/guest"
step "The guest reaches a web server on this host by name"
show "${login[@]}" "wget -qO- http://host.portway.internal:$host_port/"

if [ "${ONCE:-}" = 1 ]; then exit 0; fi
step "The VM is up; Ctrl-C ends it"
echo "  ${login[*]}"
echo "  curl http://localhost:$web_port/cgi-bin/guest"
echo "  $portway ports; $portway publish 2323:22"
wait "$vm"
vm=''
