#!/usr/bin/env bash
# Trains the recipes of docs/results.md at full length, one after the other, each on one thread unless told otherwise:
# days on a small machine without a GPU. Which recipes, and where archives lie that cannot be downloaded:
#   RECIPES="omniglot-protonet omniglot-maml" OMNIGLOT=DIR MNIST=DIR MINI_IMAGENET=DIR bash bench/reproduce.sh
# Without RECIPES, those on glyphs and Omniglot, and those on MNIST, mini-ImageNet, emoji and photos where data/ has the
# images or MNIST or MINI_IMAGENET says where their archives lie; what is left out is said.
# A run that is stopped goes on from its last checkpoint when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
kshot=.venv/bin/kshot

names() { for file in flows/recipes/$1.toml; do basename "$file" .toml; done; }
bring() { [ -d "data/$1" ] || "$kshot" data import "$1" "$1" ${2:+--from "$2"}; }
here() {  # those of the data set $1 only where it is, or where $2 says that its archives are
    if [ -n "$2" ] || [ -d "data/$1" ]; then names "$3"; else echo "left out, as there is no data set $1:" $(names "$3") >&2; fi
}
timed() {  # GNU time where there is one
    if /usr/bin/env time -f '' true 2>/dev/null; then /usr/bin/env time -f "$1: %e s, %M KB at most" "${@:2}"; else time "${@:2}"; fi
}

recipes="${RECIPES:-$(
    names 'glyphs-*'
    names 'omniglot-*' | grep -v mnist
    here mnist "${MNIST:-}" 'omniglot-to-mnist-*'
    here mini-imagenet "${MINI_IMAGENET:-}" 'mini-imagenet-*'
    here emoji '' 'emoji-*'
    here photos '' 'photos-*'
)}"
case "$recipes" in *omniglot*) bring omniglot "${OMNIGLOT:-}" ;; esac
case "$recipes" in *mnist*) bring mnist "${MNIST:-}" ;; esac
case "$recipes" in *mini-imagenet*) bring mini-imagenet "${MINI_IMAGENET:-}" ;; esac
for recipe in $recipes; do
    timed "$recipe" "$kshot" run "$recipe"
done
