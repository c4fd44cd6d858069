#!/usr/bin/env bash
# Trains the recipes whose figures stand in docs/results.md, one after the other, each on one thread.
#   OMNIGLOT=/folder/with/the/archives bash bench/reproduce.sh
# A run that is stopped goes on from its last checkpoint when it is started again.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
kshot=.venv/bin/kshot

[ -d data/omniglot ] || "$kshot" data import omniglot omniglot ${OMNIGLOT:+--from "$OMNIGLOT"}
for recipe in omniglot-protonet omniglot-maml omniglot-finetune; do
    /usr/bin/env time -f "$recipe: %e s, %M KB at most" "$kshot" run "$recipe"
done
