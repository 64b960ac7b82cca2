#!/bin/sh
# race.sh: runs the tests of the packages that ci/race names under the race
# detector, with -short. Floors of passed cases are those of the whole run.
set -eu
# shellcheck disable=SC2046 # a list of words
exec scripts/gotest.sh -race -short $(sed -n 's|^\([a-z][^ ]*\) .*|./\1|p' ci/race)
