#!/bin/sh
# Runs a command of nvcc, and lists the headers that it had no use for, so that Bazel does not
# compile again when these change.
# Usage: compile_cuda.sh FILE_WITH_ALL_HEADERS FILE_FOR_UNUSED_HEADERS nvcc ARGUMENT...
set -eu
headers=$1
unused=$2
shift 2
# With this PWD, line tables name no sandbox.
PWD=/proc/self/cwd "$@" -MD -MF "$unused"
used=$(tr -s '\\ ' '\n\n' <"$unused")  # a rule of make, cut into words
printf '%s\n' "$used" | grep -Fxvf - "$headers" >"$unused" || [ $? = 1 ]  # 1: all were used
