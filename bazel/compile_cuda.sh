#!/bin/sh
# Runs a command of nvcc, and lists the headers that it had no use for, so that Bazel does not
# compile again when these change.
# Usage: compile_cuda.sh FILE_WITH_ALL_HEADERS FILE_FOR_UNUSED_HEADERS nvcc ARGUMENT...
set -eu
headers=$1
unused=$2
shift 2
# nvcc names temporary files by its process id, which may be the same in every sandbox, while /tmp is one
# for all of them if the workspace lies there. So each action has a folder of its own.
temporary=$unused.tmp
mkdir -p "$temporary"
# With this PWD, line tables name no sandbox.
PWD=/proc/self/cwd TMPDIR=/proc/self/cwd/$temporary "$@" -MD -MF "$unused"
rm -rf "$temporary"
used=$(tr -s '\\ ' '\n\n' <"$unused")  # a rule of make, cut into words
printf '%s\n' "$used" | grep -Fxvf - "$headers" >"$unused" || [ $? = 1 ]  # 1: all were used
