#!/bin/bash
# Runs the system tests with every sidecar under strace, and compares what it called behind the sandbox with the list of
# calls it may make (forwarder/src/sandbox/calls.rs). `make calls`. FILTER chooses tests, in nextest's language.
set -euo pipefail
program=$(readlink -f "${PORTWAY_BIN:?the program: target/debug/portway}")
traces=$(mktemp -d)
trap 'rm -rf "$traces"' EXIT
chmod 1777 "$traces"

# What tests start in place of the program: the sidecar and its personalities under strace, all else as it is.
cat > "$traces/portway" <<END
#!/bin/bash
case "\${1:-} \$(basename "\$0")" in
serve\ * | slirp4netns\ * | vpnkit\ * | gvproxy\ * | *\ slirp4netns | *\ vpnkit | *\ gvproxy)
  exec -a "\$0" strace -f -qq -o "$traces/trace.\$\$" -E _=_ "$program" "\$@" ;;
*) exec -a "\$0" "$program" "\$@" ;;
esac
END
chmod 755 "$traces/portway"

# What stops or times its sidecar, attaches a tracer of its own or needs it untraced is not of use here.
filter=${FILTER:-'binary(serve) + binary(control) + binary(links) + binary(security) + binary(security_services) + binary(security_peers) + binary(join) + binary(agent) + binary(dns_clients) + binary(dhcp_clients)'}
status=0
PORTWAY_BIN="$traces/portway" cargo nextest run --workspace --no-fail-fast -E "$filter" || status=$?
[ "$status" = 0 ] || echo "calls: some tests failed under strace, which is slow; what they called is compared all the same"
PORTWAY_BIN="$program" PORTWAY_TRACES="$traces" cargo nextest run --workspace --run-ignored only --no-capture \
  -E 'binary(sandbox) & test(the_suites_traces)'
