#!/usr/bin/env bash
# `make deploy-test`: builds the production image on Debian's own Python, runs what the dev overlay prints in
# containers, and leaves nothing behind but the base image and the packages that it installs.
set -euo pipefail
cd "$(dirname "$0")/../.."

# CI sets DEPLOY_TEST_REQUIRED, so that it does not stay green where containers could run and do not.
skip() {
  echo "deploy-test is skipped: containers cannot run here: $1"
  exit "${DEPLOY_TEST_REQUIRED:-0}"
}

# In the background, as a process group: bash hears of a signal at once only while it waits, and ends the whole step.
set -m
step() {
  "$@" &
  wait $!
}

packages=(podman runc netavark conmon iptables debootstrap)
base=localhost/feddymem-base:bookworm
image=localhost/feddymem:deploy-test
# crun cannot cope with hybrid cgroups, and Podman would ask for higher limits than a machine may set.
limits=(--ulimit nofile=20000:20000 --ulimit nproc=32768:32768)
engine=(timeout 600 podman --runtime runc)

[[ $EUID == 0 ]] || skip "root is needed"
command -v apt-get > /dev/null || skip "the packages ${packages[*]} are Debian's, and there is no apt-get"
if ! dpkg --status "${packages[@]}" &> /dev/null; then
  apt-get update --quiet
  DEBIAN_FRONTEND=noninteractive apt-get install --quiet --yes --no-install-recommends "${packages[@]}"
fi
leave() {
  local group
  for group in $(jobs -p); do kill -- "-$group"; done
  wait
  "${engine[@]}" rmi --force --ignore "$image" "$image-next" &> /dev/null
}
trap leave EXIT
trap 'exit 143' TERM
trap 'exit 130' INT
"${engine[@]}" image exists "$base" || step tests/deploy/base-image.sh "$base"
reason=$("${engine[@]}" run --rm "${limits[@]}" --network none "$base" true 2>&1) || skip "$reason"

step make images ENGINE="${engine[*]}" IMAGE="$image" BASE_IMAGE="$base" BUILD_FLAGS="${limits[*]} --layers=false --network none"
step env DEPLOY_IMAGE=$image .venv/bin/python -m pytest tests/deploy -m deploy
