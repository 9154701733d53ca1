#!/bin/sh
# What http://localhost:8080/cgi-bin/guest answers: something only the guest can know.
printf 'Content-Type: text/plain\r\n\r\n'
echo "Hello from inside the guest: $(uname -s) $(uname -r), $(ip -4 -o addr show scope global | awk '{print $2, $4}')"
echo "You are $REMOTE_ADDR"
