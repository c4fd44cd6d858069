#!/usr/bin/env bash
# Trains the recipes of docs/results.md at full length, one after the other, each on one thread unless told otherwise:
# days on a small machine without a GPU. Which recipes, and where archives lie that cannot be downloaded:
#   RECIPES="omniglot-protonet omniglot-maml" OMNIGLOT=DIR MNIST=DIR MINI_IMAGENET=DIR bash bench/reproduce.sh
# Without RECIPES, all those on Omniglot, and those on mini-ImageNet where MINI_IMAGENET says where it is.
# A run that is stopped goes on from its last checkpoint when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
kshot=.venv/bin/kshot

names() { find flows/recipes -name "$1-*.toml" -printf '%f\n' | sed 's/\.toml$//' | sort; }
bring() { [ -d "data/$1" ] || "$kshot" data import "$1" "$1" ${2:+--from "$2"}; }

recipes="${RECIPES:-$(names omniglot) ${MINI_IMAGENET:+$(names mini-imagenet)}}"
case "$recipes" in *omniglot*) bring omniglot "${OMNIGLOT:-}" ;; esac
case "$recipes" in *mnist*) bring mnist "${MNIST:-}" ;; esac
case "$recipes" in *mini-imagenet*) bring mini-imagenet "${MINI_IMAGENET:-}" ;; esac
for recipe in $recipes; do
    /usr/bin/env time -f "$recipe: %e s, %M KB at most" "$kshot" run "$recipe"
done
