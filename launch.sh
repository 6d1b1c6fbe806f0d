#!/usr/bin/env bash
# Three seeds of a recipe on eight GPUs at full length, then the record and a table: all of it in one command.
#
#   ./launch.sh               check the preconditions, run every seed, build the record folder, print the table
#   ./launch.sh --check       only check (exit code 2, with the list, if one fails)
#   ./launch.sh --rehearse    the same at demo size, a few steps, with NPROC gloo ranks on the CPU
#
# From the environment: SEEDS="42 0 1234", RECIPE=recipes/h100x8.env, NPROC=8, PYTHON, RUNS=runs/<recipe>, NAME, AUTHOR, GITHUB_ID,
# and any setting of train_gpt.py, which wins over the recipe. A seed that fails is reported and the rest go on; one that
# has finished is not run again, and other settings than it had are refused (FORCE=1 runs all anew). A record that is refused
# leaves the earlier one. Exit codes: 0, 1 (a seed or the record failed), 2 (preconditions).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
trap 'echo "error: stopped; finished seeds are kept" >&2; exit 130' INT TERM

check=0 rehearse=0
for argument in "$@"; do
    case $argument in
        --check) check=1 ;;
        --rehearse) rehearse=1 ;;
        -h | --help) sed -n '2,/^set/{/^#/s/^# \{0,1\}//p}' launch.sh; exit 0 ;;
        *) echo "error: $argument is unknown: expected --check, --rehearse or nothing" >&2; exit 2 ;;
    esac
done

if [ -z "${PYTHON-}" ]; then PYTHON=python3; [ ! -x .venv/bin/python ] || PYTHON=.venv/bin/python; fi
command -v "$PYTHON" > /dev/null || { echo "error: PYTHON=$PYTHON is not a program" >&2; exit 2; }
seeds=${SEEDS:-42 0 1234} nproc=${NPROC:-8}
export -n SEEDS         # so like SEED that the trainer would ask
for number in $seeds $nproc; do
    [[ $number =~ ^[0-9]+$ ]] || { echo "error: '$number' in SEEDS or NPROC: expected a whole number" >&2; exit 2; }
done
cpu=() recipe=${RECIPE:-recipes/h100x8.env}
if [ $rehearse = 1 ]; then
    recipe=${RECIPE:-recipes/demo.env} cpu=(--cpu)
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
    # every stage at least once; eight ranks on two cores take two minutes a seed, of which quantising takes up to 15 s
    export MAX_WALLCLOCK_SECONDS=${MAX_WALLCLOCK_SECONDS:-40} EVAL_TIME_LIMIT=${EVAL_TIME_LIMIT:-240}
    export PHASED_TTT_PREFIX_DOCS=${PHASED_TTT_PREFIX_DOCS:-0} PHASED_TTT_NUM_PHASES=${PHASED_TTT_NUM_PHASES:-1}
    export SLIDING_WINDOW_ENABLED=${SLIDING_WINDOW_ENABLED:-0} TRAIN_LOG_EVERY=${TRAIN_LOG_EVERY:-1}
fi
[ -f "$recipe" ] || { echo "error: RECIPE=$recipe is missing: expected one of $(echo recipes/*.env)" >&2; exit 2; }
. tools/recipe.sh
read_recipe "$recipe"
title=$(basename "$recipe" .env)
[ $rehearse = 0 ] || title+=-rehearsal
runs=${RUNS:-runs/$title}

if [ "${DATA_PATH-}" = ./data/sample ] && [ ! -f data/sample/tokenizer.model ] \
        && "$PYTHON" -c "import numpy, sentencepiece" 2> /dev/null; then        # a missing package is the preconditions' to name
    "$PYTHON" data/sample.py > /dev/null
fi
has_finished() { [ -z "${FORCE-}" ] && grep -q '^run_complete ' "$runs/seed$1/seed$1.txt" 2> /dev/null; }
finished=()
for seed in $seeds; do
    ! has_finished "$seed" || finished+=("$runs/seed$seed/seed$seed.txt")
done
echo "$recipe, seeds $seeds, $nproc ranks, into $runs"
"$PYTHON" tools/preconditions.py --nproc "$nproc" --folder "$runs" ${cpu[@]+"${cpu[@]}"} \
    ${finished[@]+--finished "${finished[@]}"} || exit 2
[ $check = 0 ] || exit 0

logs=() failed=()
for seed in $seeds; do
    folder=$runs/seed$seed
    log=$folder/seed$seed.txt
    if has_finished "$seed"; then
        echo "seed $seed has finished before: $log (FORCE=1 runs it again)"
        logs+=("$log")
        continue
    fi
    [ ! -e "$folder" ] || mv "$folder" "$folder.before-$(date +%Y%m%d-%H%M%S)"     # a log is of one run
    mkdir -p "$folder"
    echo "seed $seed begins: $log"
    if SEED=$seed RUN_ID=seed$seed ARTIFACT_DIR=$folder "$PYTHON" -m torch.distributed.run --standalone --nproc_per_node="$nproc" \
            train_gpt.py 2>&1 | tee "$folder/console.txt" && grep -q '^run_complete ' "$log"; then
        logs+=("$log")
    else
        failed+=("$seed")
        echo "error: seed $seed failed: $(grep -h '^error: ' "$folder/console.txt" | tail -1 || true) (see $folder/console.txt)" >&2
    fi
done

status=0
if [ ${#logs[@]} -gt 0 ]; then
    echo
    "$PYTHON" tools/seed_table.py "${logs[@]}"
    echo
    new=record.new
    rm -rf "${runs:?}/$new"
    if output=$("$PYTHON" tools/make_record.py "${logs[@]}" --non-record --min-seeds ${#logs[@]} --name "${NAME:-$title}" \
        --author "${AUTHOR:-$(git config user.name || echo unknown)}" --github-id "${GITHUB_ID:-unknown}" --out "$runs/$new"); then
        rm -rf "$runs/record"
        mv "$runs/$new" "$runs/record"
        echo "${output//"/$new/"//record/}"
    else
        echo "$output"
        [ ! -e "$runs/record" ] || echo "error: no new record: $runs/record is an earlier one" >&2
        status=1
    fi
fi
if [ ${#failed[@]} -gt 0 ]; then
    echo "error: seeds failed: ${failed[*]} of $seeds; the same command runs only these again" >&2
    status=1
fi
exit $status
