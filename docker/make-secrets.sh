#!/bin/sh
# Writes the secrets of compose.yaml as files of 64 random hexadecimal digits; leaves those that exist alone.
# Compose mounts a file with the mode it has here, and the containers run as users of their own: so the files
# can be read, by whoever may enter their directory, and on this machine that is only you.
set -eu
umask 077
directory=${1:-$(dirname "$0")/secrets}
mkdir -p "$directory"
chmod 700 "$directory"
for name in wire_key redis_password api_keys; do
    file=$directory/$name
    if [ ! -s "$file" ]; then
        od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$file"
        echo >>"$file"
    fi
    chmod 444 "$file"
done
echo "secrets are in $directory; an API key for compose.auth.yaml is in $directory/api_keys" >&2
