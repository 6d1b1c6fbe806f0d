# two GPUs: the whole recipe for 600 s, the last 30% of training again with segments of 2,048, test-time training with both contexts,
# matrices in turn on text that training has not read beside the GPU tests
cd /opt/repo; . .carry/common.sh
ln -sf /opt/data/fineweb_train_00000[0-4].bin /opt/data/fineweb_val_000000.bin /opt/train/
ln -sf /opt/data/fineweb_train_000005.bin /opt/data/fineweb_val_000000.bin /opt/fresh/
clean() { sed '/^source_begin/,/^source_end/d' /opt/run/$1/$2.txt > /opt/log/$3.txt; }
note() { echo "$SECONDS $1 $(grep -ho 'post-ema.*bpb:[0-9.]*\|diagnostic quantized.*bpb:[0-9.]*\|quantized_[a-z_]* .*bpb:[0-9.]*' /opt/log/$1.txt | tr '\n' ' ')" >> /opt/log/table.txt; touch /opt/log/$1.done; }
recipe() { set -a; . recipes/h100x8.env; set +a; export GRAD_ACCUM_STEPS=4 SEED=42; }
export DATA_PATH=/opt/train
python3 bounds.py /opt/data/fineweb_train_000000.bin > /opt/log/bounds.console 2>&1
env NPROC=2 SEEDS=42 GRAD_ACCUM_STEPS=4 CHECKPOINT_EVERY=1240 RUNS=/opt/run/launch NAME=full_length AUTHOR=us GITHUB_ID=us PYTHON=python3 \
    ./launch.sh > /opt/log/launch.txt 2>&1
clean launch/seed42 seed42 launch_seed42; note launch_seed42
(cd /opt/run/launch/record && find . -type f -printf '%s %p\n') > /opt/log/record_files.txt
two() { local n=$1; shift; mkdir -p /opt/run/$n
    (recipe; env ARTIFACT_DIR=/opt/run/$n RUN_ID=$n "$@" timeout 700 python3 -m torch.distributed.run --standalone --nproc_per_node=2 train_gpt.py > /opt/log/$n.console 2>&1)
    clean $n $n $n; note $n; }
mkdir -p /opt/run/control /opt/run/launch2048 /opt/run/control2048
cp /opt/run/launch/seed42/checkpoint.safetensors /opt/run/control/
two control RESUME=1 TRAIN_SEQ_LEN=2048
cp /opt/run/launch/seed42/final_model.int6.pglf /opt/run/launch2048/
cp /opt/run/control/final_model.int6.pglf /opt/run/control2048/
two launch2048 EVAL_ONLY=1 TTT_EVAL_SEQ_LEN=2048
two control2048 EVAL_ONLY=1 TTT_EVAL_SEQ_LEN=2048
(CUDA_VISIBLE_DEVICES=1 timeout 400 python3 -m pytest -q -m gpu tests -n 10 > /opt/log/gpu_tests.console 2>&1; touch /opt/log/gpu_tests.done) &
mkdir -p /opt/run/inq; cp /opt/run/launch/seed42/final_model.safetensors /opt/run/inq/
(recipe; env CUDA_VISIBLE_DEVICES=0 ARTIFACT_DIR=/opt/run/inq RUN_ID=inq GRAD_ACCUM_STEPS=8 GPTQ_CALIBRATION_BATCHES=16 QUANTIZE_ONLY=1 INQ_REREAD=1 DATA_PATH=/opt/fresh \
    timeout 500 python3 train_gpt.py > /opt/log/inq.console 2>&1)
clean inq inq inq; note inq
wait; touch /opt/log/all.done
