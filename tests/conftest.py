"""What every test file shares: paths, threads, the --slow option, and the toy data set (see toy.py).

    pytest                      # everything quick that this machine can run
    pytest --slow               # also what takes over half a minute
    pytest -m gpu               # only what needs a CUDA GPU
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")       # before torch: tests are tiny and run beside each other

import pytest

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "tests"):
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
