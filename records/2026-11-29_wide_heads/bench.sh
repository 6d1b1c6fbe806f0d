cd /opt/repo; . .carry/setup.sh
(
CUDA_VISIBLE_DEVICES=0 python3 bench/attention.py --lengths .carry/lengths.npy > /opt/log/attention.txt 2>&1
for v in "" "NUM_HEADS=4 NUM_KV_HEADS=2"; do
  echo "== $v"; env CUDA_VISIBLE_DEVICES=0 $v python3 bench/step.py --repeats 8 --profile
done > /opt/log/step.txt 2>&1
touch /opt/log/bench.done ) &
CUDA_VISIBLE_DEVICES=1 timeout 400 python3 -m pytest -q -m gpu tests -n 10 > /opt/log/gpu_tests.txt 2>&1
wait; touch /opt/log/all.done
