# whole runs of recipes/h100x1.env with test-time training: GPU 0 key shift and value residual, GPU 1 key shift alone; kernel tests beside the warm-up
cd /opt/repo; . .carry/setup.sh; . .carry/common.sh
one() {
    g=$1; n=$2; shift 2
    env CUDA_VISIBLE_DEVICES=$g ARTIFACT_DIR=/opt/run/$n RUN_ID=$n TTT_ENABLED=1 "$@" timeout 540 python3 train_gpt.py > /opt/log/$n.console 2>&1
    clean $n; touch /opt/log/$n.done
}
one 0 both &
one 1 shift VALUE_RESIDUAL_ENABLED=0 &
CUDA_VISIBLE_DEVICES=1 timeout 100 python3 -m pytest -q -m gpu tests/test_kernels.py -k "qkv or compile" -n 2 2>&1 | tail -8 > /opt/log/gpu_tests.txt
wait; touch /opt/log/fin.done
