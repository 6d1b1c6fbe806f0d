"""CASEOPS_ENABLED=1 through the whole pipeline: trains, quantises, evaluates and adapts, with bytes from the sidecar."""

import json
import shutil
import subprocess
import sys

import inspect_artifact
import numpy as np
import pytest
import shards
import toy

import train_gpt as tg

SETTINGS = dict(VOCAB_SIZE=1024, CASEOPS_ENABLED=1, MODEL_DIM=80, NUM_HEADS=2, NUM_KV_HEADS=1, NUM_LAYERS=4, XSA_LAST_N=4, ROPE_DIMS=8,
                PARALLEL_START_LAYER=3, ITERATIONS=3, TRAIN_BATCH_TOKENS=512, TRAIN_SEQ_LEN=64, EVAL_SEQ_LEN=64, VAL_BATCH_TOKENS=8192,
                GPTQ_CALIBRATION_BATCHES=1, TTT_ENABLED=1, TTT_EVAL_SEQ_LEN=64, TTT_CHUNK_SIZE=32, TTT_LORA_RANK=2, TTT_BATCH_SIZE=16,
                PHASED_TTT_PREFIX_DOCS=4, PHASED_TTT_NUM_PHASES=1, TARGET_BYTES=0, CLIP_RULE="hand")


@pytest.fixture(scope="module")
def small(data_sample_caseops, tmp_path_factory):
    """The CaseOps sample with only the first 25 validation documents."""
    folder = tmp_path_factory.mktemp("caseops")
    for name in ("fineweb_train_000000.bin", "tokenizer.model"):
        shutil.copy(data_sample_caseops / name, folder)
    tokens = tg.read_shard(data_sample_caseops / "fineweb_val_000000.bin", 1024)
    counts = tg.read_shard(data_sample_caseops / "fineweb_val_bytes_000000.bin", 65536)
    end = int(np.flatnonzero(tokens == tg.BOS)[25])
    shards.write_shard(folder / "fineweb_val_000000.bin", tokens[:end])
    shards.write_shard(folder / "fineweb_val_bytes_000000.bin", counts[:end])
    return folder


def run(folder, out, **changes):
    settings = toy.env(**SETTINGS, DATA_PATH=folder, TOKENIZER_PATH=folder / "tokenizer.model", ARTIFACT_DIR=out, RUN_ID="caseops", **changes)
    return subprocess.run([sys.executable, str(toy.SCRIPT)], env={**toy.clean_environment(), **settings}, capture_output=True, text=True,
                          timeout=300)


def test_whole_pipeline_counts_the_sidecars_bytes(small, tmp_path):
    result = run(small, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    total = int(tg.read_shard(small / "fineweb_val_bytes_000000.bin", 65536).astype(int)[1:].sum())
    targets = len(tg.read_shard(small / "fineweb_val_000000.bin", 1024)) - 1
    labels = ("diagnostic pre-quantization post-ema", "diagnostic quantized", "quantized_ttt_phased")
    for label in labels:
        line = next(x for x in result.stdout.splitlines() if x.startswith(label))
        loss, bpb = (float(part.split(":")[1]) for part in line.removeprefix(label).split()[:2])
        assert bpb == pytest.approx(loss / np.log(2) * targets / total, rel=1e-6)
    artifact = next(tmp_path.glob("final_model.int*.pglf"))
    report = inspect_artifact.inspect(artifact)
    assert report["bytes"] == artifact.stat().st_size == report["header_bytes"] + sum(report["streams"].values())
    assert report["integers"] + report["float16_values"] == sum(int(np.prod(r["shape"])) for r in report["tensors"])
    json.dumps(report)
    assert "tok_emb.weight" in inspect_artifact.table(report)
    damaged = tmp_path / "damaged.pglf"
    data = bytearray(artifact.read_bytes())
    data[-5] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(tg.UserError, match="checksum of stream"):
        inspect_artifact.inspect(damaged)


@pytest.mark.parametrize("fault, says", [("missing", "fineweb_val_bytes_000000.bin is missing"), ("short", "entries: expected one for each of")])
def test_sidecar_faults_are_one_line(small, tmp_path, fault, says):
    folder = tmp_path / "data"
    shutil.copytree(small, folder)
    sidecar = folder / "fineweb_val_bytes_000000.bin"
    counts = tg.read_shard(sidecar, 65536)[:-3].copy()
    sidecar.unlink()
    if fault == "short":
        shards.write_shard(sidecar, counts)
    result = run(folder, tmp_path / "out")
    errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1 and says in errors[0]
