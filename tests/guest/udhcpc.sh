#!/bin/sh
# What busybox udhcpc runs at each event: configures the device by the lease and tells pid 1.
case $1 in
deconfig)
  ip link set "$interface" up
  ip -4 addr flush dev "$interface"
  ;;
bound | renew)
  [ -n "$mtu" ] && ip link set "$interface" mtu "$mtu"
  ip addr replace "$ip/$mask" dev "$interface"
  if [ -n "$staticroutes" ]; then
    # RFC 3442: with option 121 the router option is ignored. DESTINATION GATEWAY pairs.
    set -- $staticroutes
    while [ $# -ge 2 ]; do
      if [ "$2" = 0.0.0.0 ]; then ip route replace "$1" dev "$interface"; else ip route replace "$1" via "$2"; fi
      shift 2
    done
  else
    for gateway in $router; do ip route replace default via "$gateway"; break; done
  fi
  {
    [ -n "${search:-$domain}" ] && echo "search ${search:-$domain}"
    for server in $dns; do echo "nameserver $server"; done
  } > /etc/resolv.conf
  [ -n "$hostname" ] && echo "$hostname" > /proc/sys/kernel/hostname
  # For the VM test: what the server gave.
  env | grep -E '^(ip|mask|subnet|broadcast|router|dns|domain|search|mtu|lease|serverid|staticroutes|hostname)=' | sort > /run/portway/lease
  echo "lease $ip" > /run/portway/events
  ;;
esac
