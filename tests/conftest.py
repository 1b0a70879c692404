"""One thread a test process: the tests run side by side (pytest-xdist), and so do the scripts that they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic


def pytest_xdist_auto_num_workers(config) -> int:
    """A test process more than there are cores: a quarter of the time they wait for processes that they started."""
    return (os.cpu_count() or 1) + 1
