"""What every test file shares: paths, threads, the --slow option, the toy data set (see toy.py), and sample sets.

    pytest                      # everything quick that this machine can run
    pytest --slow               # also what takes over half a minute
    pytest -m gpu               # only what needs a CUDA GPU
"""

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch: tests are tiny and run beside each other

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "data"
for folder in (ROOT, DATA, ROOT / "tests"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take over half a minute")


def pytest_collection_modifyitems(config, items):
    import torch
    torch.set_num_threads(1)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory):
    """Folder of a toy data set: two train shards, two val shards, tokenizer.model (made once a process)."""
    import toy
    return toy.write_data(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def world():
    import toy
    return toy.world()


def data_run_script(name, *args, **options):
    """Run data/<name> in its own process; the result has returncode, stdout and stderr as text."""
    command = [sys.executable, str(DATA / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="session")
def data_run():
    return data_run_script


def make_sample(folder, *options):
    result = data_run_script("sample.py", "--out", folder, *options)
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def data_sample(tmp_path_factory):
    """A folder made by data/sample.py."""
    return make_sample(tmp_path_factory.mktemp("sample"))


@pytest.fixture(scope="session")
def data_sample_caseops(tmp_path_factory):
    """A folder made by data/sample.py --caseops."""
    return make_sample(tmp_path_factory.mktemp("sample_caseops"), "--caseops")
