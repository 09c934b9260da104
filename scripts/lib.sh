# shellcheck shell=bash
# What the scripts here share. Sourced, never run.

set -euo pipefail
script=$(realpath "$0")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# A plain user's PATH on Debian lacks the folders where ip, nft and iptables lie.
PATH="$PATH:/usr/sbin:/sbin"

say() { printf '\n== %s\n' "$*" >&2; }

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Runs a command as root: directly when we are root, else through sudo.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo -- "$@"
    else
        die "'$*' needs root and there is no sudo: run this script as root"
    fi
}

# The first comment block of the calling script is its help.
usage() { sed -n '2,/^[^#]/{s/^# \{0,1\}//;/^[^#]*$/p;}' "$script" | sed '/^set \|^\. \|^source /d'; }

# Where cargo puts what it builds.
target_dir() { printf '%s' "${CARGO_TARGET_DIR:-$PWD/target}"; }

# What tests with this program could have left on this machine: one line each, sorted.
leftovers() {
    local program=$1 pid
    {
        ip netns list 2>/dev/null | sed 's/ .*//; s/^/namespace /'
        ip -o link show 2>/dev/null | sed -n 's/^[0-9]*: \([^:@]*\).*/\1/p' | grep -E '^(tl|towline)' | sed 's/^/interface /'
        as_root nft list tables 2>/dev/null | grep -i towline
        # Somebody's real agent may start meanwhile; this build's program is ours.
        for pid in $(pgrep -x towline); do
            [ "$(as_root readlink "/proc/$pid/exe")" = "$program" ] && printf 'process %s\n' "$pid"
        done
    } | sort || true
}
