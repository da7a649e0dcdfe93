#!/usr/bin/env bash
# build.sh OUT: builds the network and what tests it without a GPU: OUT/scenarios, OUT/fake_driver.so.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$(mkdir -p "$1" && cd "$1" && pwd)
flags=(-std=c++17 -O1 -Wall -Wextra -Werror -pthread)
"$here/../build.sh" "$out" &
g++ "${flags[@]}" -shared -fPIC "$here/fake_driver.cc" -o "$out/fake_driver.so"
g++ "${flags[@]}" "$here/pes.cc" "$here/scenarios.cc" -o "$out/scenarios" -ldl
wait $!
