#!/usr/bin/env bash
# Makes an image of Debian's own Python that stands in for python:3.11-slim-bookworm, where there is no registry.
set -euo pipefail
name=$1
root=$(mktemp --directory)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv,python3-pip bookworm "$root" >&2
ln --symbolic python3 "$root/usr/bin/python"
rm -rf "$root"/usr/lib/python3*/EXTERNALLY-MANAGED "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/*
tar --directory "$root" --numeric-owner --create . | podman --runtime runc import --quiet - "$name"
