export PYTHONPATH=/tmp/site:/opt/fa3 FA3_DIR=/opt/fa3 PYTHONUNBUFFERED=1
export TOKENIZER_PATH=/opt/data/fineweb_8192_bpe.model GIT_REVISION=$(cat /opt/repo/.carry/revision)
