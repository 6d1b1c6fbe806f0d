#!/usr/bin/env bash
# The whole pipeline at toy size, on a GPU if there is one, else on the CPU: two to three minutes on two cores.
# Any setting can be given in the environment and wins over recipes/demo.env: MAX_WALLCLOCK_SECONDS=30 ./demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
tools/install.sh requirements.txt
. tools/recipe.sh
read_recipe recipes/demo.env
[ "$DATA_PATH" != ./data/sample ] || .venv/bin/python data/sample.py
export ARTIFACT_DIR=${ARTIFACT_DIR:-runs/demo} RUN_ID=${RUN_ID:-demo-$(date +%Y%m%d-%H%M%S)}
.venv/bin/python train_gpt.py
log=$ARTIFACT_DIR/$RUN_ID.txt
[ -f "$log" ] || exit 0                                 # CONFIG_CHECK=1 only prints
# QUANTIZE_ONLY=1 and EVAL_ONLY=1 do not train
grep -Eq '^[0-9]+/[0-9]+ (train|val)_loss: ' "$log" || { echo "no loss in this run, so no table and plot: $log"; exit 0; }
plot=$ARTIFACT_DIR/$RUN_ID.png
.venv/bin/python tools/plot_log.py "$log" -o "$plot" > /dev/null
echo
.venv/bin/python tools/parse_log.py "$log"
printf '%-26s %s\n' log "$log" artifact "$(ls "$ARTIFACT_DIR"/final_model.int*)" script "$ARTIFACT_DIR/final_model.train_gpt.py" plot "$plot"
