#!/usr/bin/env bash
# build.sh OUT: builds the network as OUT/nvshmem_transport_ibrc.so.3, under the name that NVSHMEM 3.4
# opens. Needs g++ alone. CXXFLAGS are added.
set -euo pipefail
if [ $# -ne 1 ]; then
  echo "usage: $0 OUT" >&2
  exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
name=nvshmem_transport_ibrc.so.3
work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
# What others see: the functions that NVSHMEM and tests call, and gethostname.
printf '%s\n' "$here"/*.cc | xargs -P "$(nproc)" -I{} sh -c \
  'g++ -std=c++17 -O1 -Wall -Wextra -Werror -fPIC -pthread '"${CXXFLAGS:-}"' -c "$1" \
     -o "$2/$(basename "$1").o"' sh {} "$work"
g++ -shared -pthread -Wl,-soname,$name -Wl,--version-script="$here/symbols.map" -Wl,-z,defs \
  "$work"/*.o -o "$work/$name" -ldl
mv "$work/$name" "$out/$name"  # processes that have the old one open keep it
