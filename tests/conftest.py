"""Fixtures shared by the data tests: the scripts of data/ importable, and sample sets built once a session."""

import subprocess
import sys
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.insert(0, str(DATA))


def data_run_script(name, *args, **options):
    """Run data/<name> in its own process; the result has returncode, stdout and stderr as text."""
    command = [sys.executable, str(DATA / name), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@pytest.fixture(scope="session")
def data_run():
    return data_run_script


@pytest.fixture(scope="session")
def data_sample(tmp_path_factory):
    """A folder made by data/sample.py."""
    out = tmp_path_factory.mktemp("sample")
    result = data_run_script("sample.py", "--out", out)
    assert result.returncode == 0, result.stderr
    return out


@pytest.fixture(scope="session")
def data_sample_caseops(tmp_path_factory):
    """A folder made by data/sample.py --caseops."""
    out = tmp_path_factory.mktemp("sample_caseops")
    result = data_run_script("sample.py", "--out", out, "--caseops")
    assert result.returncode == 0, result.stderr
    return out
