"""One thread a test process: the tests run side by side (pytest-xdist), and so do the scripts that they start."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
