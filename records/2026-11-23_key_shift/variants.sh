# GPU 0: the whole run of recipes/h100x1.env with test-time training at today's defaults; GPU 1: variants, two at a time
cd /opt/repo; . .carry/setup.sh; . .carry/common.sh
python3 /opt/carry/try_patch.py train_gpt.py try_05.py; python3 /opt/carry/try_patch.py train_gpt.py try_03.py 0.3
cat > /opt/one.sh <<'E'
IFS=: read n f t rest <<< "$1"
env CUDA_VISIBLE_DEVICES=1 TRY=$t $rest ARTIFACT_DIR=/opt/run/$n RUN_ID=$n PREQUANT_ONLY=1 MAX_WALLCLOCK_SECONDS=0 ITERATIONS=400 TRAIN_BATCH_TOKENS=98304 GRAD_ACCUM_STEPS=1 TRAIN_GRAPHS=0 EMA_DECAY=0.99 MUON_MOMENTUM_WARMUP_STEPS=100 WARMUP_STEPS=1 TRAIN_LOG_EVERY=25 timeout 200 python3 $f > /opt/log/$n.console 2>&1
sed '/^source_begin/,/^source_end/d' /opt/run/$n/$n.txt > /opt/log/$n.txt
echo "$SECONDS $n $(grep -h 'post-ema' /opt/log/$n.txt) $(tail -1 /opt/log/$n.console | cut -c1-200)" >> /opt/log/table.txt
E
B="base:try_05.py::A=1
mlpgate:try_05.py:mlpgate:A=1
vres:try_05.py:vres:A=1
keyshift:try_05.py:keyshift:A=1
normuon:try_05.py:normuon:A=1
mix:try_05.py:mix:A=1
cwd:try_05.py:cwd:A=1
conv:try_05.py:kconv,vconv:A=1
backout:try_05.py:backout:A=1
slope3:try_03.py::A=1
seed2:try_05.py::SEED=7"
(echo "$B" | tr '\n' '\0' | xargs -0 -P2 -I{} bash /opt/one.sh {}; touch /opt/log/try.done) &
n=g_full
env CUDA_VISIBLE_DEVICES=0 ARTIFACT_DIR=/opt/run/$n RUN_ID=$n WINDOWED_EVAL_ENABLED=1 TTT_ENABLED=1 timeout 560 python3 train_gpt.py > /opt/log/$n.console 2>&1
clean $n; touch /opt/log/g_full.done
wait; touch /opt/log/mix.done
