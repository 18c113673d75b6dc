#!/bin/sh
# Installs redis-server from Debian when this user may; without it the token cache lives in each process.
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    # runlevel 1 keeps the package from starting a server of its own
    export DEBIAN_FRONTEND=noninteractive RUNLEVEL=1
    apt-get update -qq && apt-get install -y -qq --no-install-recommends redis-server >/dev/null && exit 0
fi
echo "redis-server is not installed; going on with an in-process token cache" >&2
