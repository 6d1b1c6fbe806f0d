export DATA_PATH=/opt/data TOKENIZER_PATH=/opt/data/fineweb_8192_bpe.model GIT_REVISION=$(cat .carry/revision)
set -a; . recipes/h100x1.env; set +a
clean() { sed '/^source_begin/,/^source_end/d' /opt/run/$1/$1.txt > /opt/log/$1.txt 2>/dev/null; tail -5 /opt/log/$1.console >> /opt/log/errors.txt; }
