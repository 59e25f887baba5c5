#!/usr/bin/env bash
# The container engine of the tests.
#
#   tests/engine.sh up      have one that answers and has the image of local-docker
#   tests/engine.sh down    end it, if `up` has started it and nobody needs it any more
#
# One that answers already is used, and never ended. Where there is none, root on Debian and its like gets
# Debian's, with a base image made of Debian's packages: no registry is asked, and packages come from where apt
# and pip of this machine have theirs. What was made is kept, so that only the first time takes its minutes.
# Elsewhere the tests go without, and this says why; CODE_SANDBOXES_REQUIRE_DOCKER=1 makes that an error.
#
# PYTHON    that of the tests, in which this project is installed (python3)
# The caller is who needs the engine: the process that has started this script, until it calls `down` or ends.
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
IMAGE=code-sandboxes-jupyter:latest
MADE_OF=io.code-sandboxes.made-of # the label that says what an image was made of
SOCKET=/var/run/docker.sock
POLICY=/usr/sbin/policy-rc.d # keeps packages from starting their services

cache=${XDG_CACHE_HOME:-$HOME/.cache}/code-sandboxes-tests
users=$cache/users # one file for each process that needs the engine that we have started
pidfile=$cache/engine.pid

say() { echo "engine: $*" >&2; }

give_up() {
    down
    if [ "${CODE_SANDBOXES_REQUIRE_DOCKER:-}" = 1 ]; then
        echo "!! there is no container engine, and CODE_SANDBOXES_REQUIRE_DOCKER=1: $1" >&2
        exit 1
    fi
    echo "!! the tests of local-docker will be skipped, as there is no container engine: $1" >&2
    exit 0
}

# The name of a step, and its command. What that says goes to a file, of which the end is shown if it fails.
logged() {
    local step=$1 log=$cache/$1.log
    shift
    "$@" > "$log" 2>&1 < /dev/null || {
        tail -n 15 "$log" >&2
        give_up "the step '$step' failed, see $log"
    }
}

# The engine.

answers() { docker version --format '{{.Server.Version}}' > /dev/null 2>&1; }

is_ours() { [ -s "$pidfile" ] && kill -0 "$(cat "$pidfile")" 2> /dev/null; }

is_debian() { [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; }

start() {
    [ -z "${DOCKER_HOST:-}" ] || give_up "nobody answers at DOCKER_HOST=$DOCKER_HOST"
    [ "$(uname -s)" = Linux ] || give_up "none answers, and on $(uname -s) one cannot be started from here"
    if ! is_debian; then
        command -v docker > /dev/null || give_up "there is no command docker"
        give_up "none answers to this user, and to start one here it takes root, and apt-get"
    fi
    [ -e /sys/fs/cgroup/cgroup.controllers ] || mountpoint -q /sys/fs/cgroup ||
        give_up "none answers, and without a cgroup file system none can be started"
    install dockerd=docker.io iptables=iptables
    install docker=docker-cli # from Debian 13 on it is not in docker.io
    if [ "$(cat /sys/module/apparmor/parameters/enabled 2> /dev/null)" = Y ]; then
        install apparmor_parser=apparmor # without it containers do not start there
    fi
    say "starting dockerd"
    # Nobody who waits for the lock may wait for the engine to end; and Ctrl-C is not for it.
    setsid dockerd --data-root "$cache/docker" --exec-root /run/code-sandboxes-tests --pidfile "$pidfile" \
        --host "unix://$SOCKET" --log-level warn > "$cache/dockerd.log" 2>&1 < /dev/null 9>&- &
    local started=$!
    for _ in $(seq 300); do
        answers && return
        kill -0 "$started" 2> /dev/null || break
        sleep 0.2
    done
    tail -n 5 "$cache/dockerd.log" >&2
    give_up "dockerd did not start, see $cache/dockerd.log"
}

# Ours, if nobody needs it.
unneeded() {
    is_ours || return 0
    local user
    for user in "$users"/*; do
        if kill -0 "${user##*/}" 2> /dev/null; then
            say "left running, as process ${user##*/} needs it"
            return
        fi
        rm -f "$user"
    done
    local number
    number=$(cat "$pidfile")
    say "ending dockerd"
    kill "$number"
    for _ in $(seq 150); do
        [ -d "/proc/$number" ] || return 0
        sleep 0.2
    done
    kill -KILL "$number" && rm -f "$pidfile"
}

# Installs the packages whose commands are missing: command=package.
install() {
    local each missing=()
    for each in "$@"; do
        command -v "${each%%=*}" > /dev/null || missing+=("${each#*=}")
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    if [ ! -e $POLICY ]; then
        trap 'rm -f $POLICY' EXIT
        printf '#!/bin/sh\nexit 101\n' > $POLICY
        chmod +x $POLICY
    fi
    export DEBIAN_FRONTEND=noninteractive
    logged apt-update apt-get -o DPkg::Lock::Timeout=300 update
    logged apt-install apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "${missing[@]}"
}

# Its images.

has_image() { docker image inspect "$1" > /dev/null 2>&1; }

made_of() { docker image inspect --format "{{index .Config.Labels \"$MADE_OF\"}}" "$1" 2> /dev/null || true; }

# Which Debian, or what is like it, this machine has: the base image is the same, so that a wheel that suits the
# system's Python here suits the one there.
# shellcheck source=/dev/null
release() { . /etc/os-release && echo "${VERSION_CODENAME:-}"; }

# What apt of this machine has of the distribution itself, in lines of a sources.list.
# shellcheck disable=SC2016 # the names are apt's
sources() {
    apt-get indextargets --format '$(ORIGIN) deb $(REPO_URI) $(RELEASE) $(COMPONENT)' 'Identifier: Packages' |
        sed -n -E 's/^(Debian|Ubuntu) (deb .*)/\2/p' | sort -u
}

make_base() {
    [ -n "$(sources)" ] || logged apt-update apt-get -o DPkg::Lock::Timeout=300 update
    if apt-cache show mmdebstrap > /dev/null 2>&1; then install mmdebstrap=mmdebstrap; fi
    say "making a base image of $(release)'s packages"
    local include=ca-certificates,python3,python3-venv
    if command -v mmdebstrap > /dev/null; then
        # What it takes to reach the mirror from here: proxies, and which dates to believe.
        apt-config dump Acquire::http Acquire::https Acquire::Check-Valid-Until Acquire::Check-Date > "$cache/apt.conf"
        sources > "$cache/sources.list"
        logged base mmdebstrap --variant=minbase --include=$include --aptopt="$cache/apt.conf" \
            --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/doc/*' \
            "$(release)" "$cache/base.tar" "$cache/sources.list"
    else
        install debootstrap=debootstrap
        rm -rf "$cache/base"
        logged base debootstrap --variant=minbase --include=$include "$(release)" "$cache/base" \
            "$(sources | sed -n "s/^deb \(.*\) $(release) main$/\1/p" | head -n 1)"
        tar -C "$cache/base" --numeric-owner -cf "$cache/base.tar" .
        rm -rf "$cache/base"
    fi
    logged import docker import --change 'CMD ["/bin/bash"]' "$cache/base.tar" "$1"
    rm -f "$cache/base.tar"
}

# Makes the image where there is none of what is there now.
build() {
    local base='' arguments=() key
    if is_debian; then
        base=code-sandboxes-base:$(release)
        has_image "$base" || make_base "$base"
    fi
    key=$(cat docker/Dockerfile docker/requirements.txt - <<< "$base" | sha256sum | cut -c 1-16)
    [ "$(made_of $IMAGE)" != "$key" ] || return 0
    if [ -n "$base" ]; then
        say "fetching wheels"
        install /usr/bin/python3=python3
        rm -rf "$cache/wheels"
        # By pip of this machine, since that can reach an index, and for the Python of the system, which is the
        # one of the base image.
        logged wheels "$PYTHON" -m pip --python /usr/bin/python3 --disable-pip-version-check \
            wheel --wheel-dir "$cache/wheels" --requirement docker/requirements.txt
        arguments=(--base-image "$base" --wheels "$cache/wheels" --network none)
    fi
    say "building $IMAGE"
    logged build "$PYTHON" -m code_sandboxes build-image --tag $IMAGE --label "$MADE_OF=$key" \
        ${arguments[@]+"${arguments[@]}"}
    # The one that it was before.
    docker image prune --force --filter label=$MADE_OF > /dev/null
}

smoke() {
    logged smoke docker run --rm --network none --cap-drop ALL --security-opt no-new-privileges --read-only \
        --memory 256m --pids-limit 32 $IMAGE python -c 'import os; assert os.getuid() == 10001'
}

up() {
    # Before anything is started: whoever ends in between must not leave it behind.
    touch "$users/$PPID"
    answers || start
    build
    smoke
    say "$(docker version --format '{{.Server.Version}}'), with $IMAGE"
}

down() {
    rm -f "$users/$PPID"
    unneeded
}

case "${1:-}" in
up | down) ;;
*)
    echo "usage: $0 up|down" >&2
    exit 2
    ;;
esac
mkdir -p "$users"
exec 9> "$cache/lock"
if command -v flock > /dev/null; then flock 9; fi
"$1"
