# two GPUs: 192 s of recipes/h100x1.env once up to step 800 (0.68 of the budget), from there with and without segments of 3,072
cd /opt/repo; . .carry/common.sh
ln -sf /opt/data/fineweb_train_00000[0-5].bin /opt/data/fineweb_val_000000.bin /opt/train/
clean() { sed '/^source_begin/,/^source_end/d' /opt/run/$1/$1.txt > /opt/log/$1.txt; }
note() { echo "$SECONDS $1 $(grep -ho 'post-ema.*bpb:[0-9.]*\|diagnostic quantized.*bpb:[0-9.]*\|quantized_[a-z_]* .*bpb:[0-9.]*' /opt/log/$1.txt | tr '\n' ' ')" >> /opt/log/table.txt; touch /opt/log/$1.done; }
one() { local g=$1 n=$2; shift 2; mkdir -p /opt/run/$n
    (set -a; . recipes/h100x1.env; set +a; export DATA_PATH=/opt/train MAX_WALLCLOCK_SECONDS=200 GPTQ_RESERVE_SECONDS=8 INQ_STEPS=0 TTT_ENABLED=1 WINDOWED_EVAL_ENABLED=1
     env CUDA_VISIBLE_DEVICES=$g ARTIFACT_DIR=/opt/run/$n RUN_ID=$n "$@" timeout 500 python3 train_gpt.py > /opt/log/$n.console 2>&1)
    clean $n; note $n; }
branch() { local g=$1 n=$2; shift 2; mkdir -p /opt/run/$n /opt/run/${n}_2048; cp /opt/run/first/checkpoint.safetensors /opt/run/$n/
    one $g $n RESUME=1 "$@"
    cp /opt/run/$n/final_model.int6.pglf /opt/run/${n}_2048/; one $g ${n}_2048 EVAL_ONLY=1 TTT_EVAL_SEQ_LEN=2048; }
(CUDA_VISIBLE_DEVICES=1 timeout 300 python3 -m pytest -q -m gpu tests -n 10 > /opt/log/gpu_tests.console 2>&1; touch /opt/log/gpu_tests.done) &
one 0 first ITERATIONS=800 CHECKPOINT_EVERY=800 PREQUANT_ONLY=1
until [ -e /opt/log/gpu_tests.done ]; do sleep 1; done
branch 0 same TRAIN_SEQ_LEN=2048 &
branch 1 longer &
wait
mkdir -p /opt/run/full_2048; cp .art/final_model.int6.pglf /opt/run/full_2048/
one 0 full_2048 EVAL_ONLY=1 TTT_EVAL_SEQ_LEN=2048 &
mkdir -p /opt/run/full_3584; cp .art/final_model.int6.pglf /opt/run/full_3584/
one 1 full_3584 EVAL_ONLY=1 TTT_EVAL_SEQ_LEN=3584 &
wait; touch /opt/log/all.done
