#!/usr/bin/env bash
# `make deploy-test`: builds the production image on Debian's own Python, runs what the dev overlay prints in
# containers, and leaves nothing behind but the base image and the packages that it installs.
set -euo pipefail
cd "$(dirname "$0")/../.."

skip() {
  echo "deploy-test is skipped: containers cannot run here: $1"
  exit 0
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
"${engine[@]}" image exists "$base" || tests/deploy/base-image.sh "$base"
reason=$("${engine[@]}" run --rm "${limits[@]}" --network none "$base" true 2>&1) || skip "$reason"

trap '"${engine[@]}" rmi --force --ignore "$image" > /dev/null' EXIT
make images ENGINE="${engine[*]}" IMAGE="$image" BASE_IMAGE="$base" BUILD_FLAGS="${limits[*]} --layers=false --network none"
DEPLOY_IMAGE=$image .venv/bin/python -m pytest tests/deploy -m deploy
