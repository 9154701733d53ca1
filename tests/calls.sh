#!/bin/bash
# Runs the system tests with every sidecar under strace, and compares what it called behind the sandbox with the list of
# calls it may make (forwarder/src/sandbox/calls.rs). `make calls`. SUITES chooses files of tests, and FILTER among them, in
# nextest's language.
set -euo pipefail
program=$(readlink -f "${PORTWAY_BIN:?the program: target/debug/portway}")
# Tests look for it beside the program, and here that is the stand-in.
export PORTWAY_AGENT_BIN=${PORTWAY_AGENT_BIN:-$(dirname "$program")/portway-agent}
traces=$(mktemp -d)
trap 'rm -rf "$traces"' EXIT
chmod 1777 "$traces"

# What tests start in place of the program: the sidecar and its personalities under strace, all else as it is. The tracer is
# nobody's child and has none of the descriptors: who starts the program has its process id, its signals reach it, and a pipe that it
# closes is closed.
cat > "$traces/portway" <<END
#!/bin/bash
case "\${1:-} \$(basename "\$0")" in
serve\ * | slirp4netns\ * | vpnkit\ * | gvproxy\ * | *\ slirp4netns | *\ vpnkit | *\ gvproxy)
  (
    for fd in /proc/self/fd/*; do
      fd=\${fd##*/}
      [ "\$fd" -le 2 ] || eval "exec \$fd>&-"
    done
    strace -f -qq -o "$traces/trace.\$\$" -p \$\$ < /dev/null > /dev/null 2>&1 &
  )
  for _ in {1..1000}; do
    grep -q '^TracerPid:.*[1-9]' /proc/\$\$/status && break
    sleep 0.01
  done ;;
esac
exec -a "\$0" "$program" "\$@"
END
chmod 755 "$traces/portway"

# What times its sidecar, attaches a tracer of its own or needs it untraced is not of use here, nor what needs a whole VM.
suites=${SUITES:-serve control links join security security_services security_peers dns_clients dhcp_clients two_stack host_changes
  faults_outputs agent agent_rules agent_containers gvproxy gvproxy_ssh personality}
chosen=()
for suite in $suites; do chosen+=(--test "$suite"); done
status=0
PORTWAY_BIN="$traces/portway" cargo nextest run --workspace --locked --no-fail-fast "${chosen[@]}" ${FILTER:+-E "$FILTER"} || status=$?
[ "$status" = 0 ] || echo "calls: some tests failed under strace, which is slow; what they called is compared all the same"
PORTWAY_BIN="$program" PORTWAY_TRACES="$traces" cargo nextest run --workspace --locked --test sandbox --run-ignored only --no-capture \
  -E 'test(the_suites_traces)'
