cd /opt/repo; . .carry/setup.sh; . .carry/common.sh
one() { g=$1; n=$2; shift 2
    env CUDA_VISIBLE_DEVICES=$g ARTIFACT_DIR=/opt/run/$n RUN_ID=$n PREQUANT_ONLY=1 MAX_WALLCLOCK_SECONDS=110 GPTQ_RESERVE_SECONDS=0 EMA_DECAY=0.99 MUON_MOMENTUM_WARMUP_STEPS=200 WARMUP_STEPS=1 TRAIN_LOG_EVERY=25 "$@" timeout 240 python3 train_gpt.py > /opt/log/$n.console 2>&1
    clean $n; }
H="NUM_HEADS=4 NUM_KV_HEADS=2"
(one 0 base A=1; one 0 heads4_rope32 $H ROPE_DIMS=32) &
(one 1 heads4 $H; one 1 layers13 $H NUM_LAYERS=13 XSA_LAST_N=13 NUM_LOOPS=1 LOOP_START=4 LOOP_END=7 PARALLEL_START_LAYER=9) &
wait; touch /opt/log/lease2.done
