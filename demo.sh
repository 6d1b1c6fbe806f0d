#!/usr/bin/env bash
# The whole pipeline at toy size, on a GPU if there is one, else on the CPU: two to three minutes on two cores.
# Any setting can be given in the environment and wins over recipes/demo.env: MAX_WALLCLOCK_SECONDS=30 ./demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
tools/install.sh requirements.txt
while IFS= read -r line; do
    name=${line%%=*}
    [[ $line == \#* || -z $line || -n ${!name+given} ]] || export "$line"
done < recipes/demo.env
[ "$DATA_PATH" != ./data/sample ] || .venv/bin/python data/sample.py
export ARTIFACT_DIR=${ARTIFACT_DIR:-runs/demo} RUN_ID=${RUN_ID:-demo-$(date +%Y%m%d-%H%M%S)}
.venv/bin/python train_gpt.py
log=$ARTIFACT_DIR/$RUN_ID.txt
plot=$ARTIFACT_DIR/$RUN_ID.png
.venv/bin/python tools/plot_log.py "$log" -o "$plot" > /dev/null
echo
.venv/bin/python tools/parse_log.py "$log"
printf '%-26s %s\n' log "$log" artifact "$(ls "$ARTIFACT_DIR"/final_model.int*)" script "$ARTIFACT_DIR/final_model.train_gpt.py" plot "$plot"
