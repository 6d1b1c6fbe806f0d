# two queues, one a GPU: 300 s each of the network with heads of 128, of 13 layers, of the former default, of 15 or 12 layers
cd /opt/repo; . .carry/setup.sh; . .carry/common.sh
mkdir -p /opt/train /opt/fresh
ln -sf /opt/data/fineweb_train_00000[0-4].bin /opt/data/fineweb_val_000000.bin /opt/train/
ln -sf /opt/data/fineweb_train_000005.bin /opt/data/fineweb_val_000000.bin /opt/fresh/
export DATA_PATH=/opt/train WINDOWED_EVAL_ENABLED=1
one() { g=$1; n=$2; shift 2
    env CUDA_VISIBLE_DEVICES=$g ARTIFACT_DIR=/opt/run/$n RUN_ID=$n "$@" timeout 560 python3 train_gpt.py > /opt/log/$n.console 2>&1
    clean $n; echo "$SECONDS $n $(grep -ho 'post-ema.*bpb:[0-9.]*\|diagnostic quantized.*bpb:[0-9.]*\|quantized_[a-z_]* .*bpb:[0-9.]*' /opt/log/$n.txt | tr '\n' ' ')" >> /opt/log/table.txt; }
again() { g=$1; n=$2; shift 2      # the same weights quantised in turn on text that training has not read
    mkdir -p /opt/run/${n}_inq; cp /opt/run/$n/final_model.safetensors /opt/run/${n}_inq/
    one $g ${n}_inq QUANTIZE_ONLY=1 INQ_REREAD=1 DATA_PATH=/opt/fresh "$@"; touch /opt/log/$n.done; }
score() { grep -ho 'diagnostic quantized .*' /opt/log/$1.txt | grep -o 'bpb:[0-9.]*' | cut -d: -f2; }
H="NUM_HEADS=4 NUM_KV_HEADS=2 ROPE_DIMS=32"
L13="$H NUM_LAYERS=13 XSA_LAST_N=13 NUM_LOOPS=1 LOOP_START=4 LOOP_END=7 PARALLEL_START_LAYER=9"
L15="$H NUM_LAYERS=15 XSA_LAST_N=15 NUM_LOOPS=1 LOOP_START=6 LOOP_END=7 PARALLEL_START_LAYER=11"
L12="$H NUM_LAYERS=12 XSA_LAST_N=12 NUM_LOOPS=1 LOOP_START=3 LOOP_END=7 PARALLEL_START_LAYER=8"
(one 0 wide_heads $H TTT_ENABLED=1; again 0 wide_heads $H; one 0 before A=1) &
(one 1 layers13 $L13 TTT_ENABLED=1; again 1 layers13 $L13
 until [ -e /opt/log/wide_heads.done ]; do sleep 1; done
 if python3 -c "import sys; sys.exit(float('$(score layers13_inq)') > float('$(score wide_heads_inq)'))"; then one 1 layers15 $L15; else one 1 layers12 $L12; fi) &
wait; touch /opt/log/lease3.done
