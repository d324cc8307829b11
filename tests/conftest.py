"""Settings that have to stand before torch and transformers are imported, and tests skipped without a GPU."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
# DeepSpeed looks for ninja there, which is installed beside this Python
os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["COLUMNS"] = "300"  # a terminal so wide that no text that a test looks for is wrapped

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# no time limit per example: the first one pays for imports and caches
settings.register_profile("tests", deadline=None, max_examples=50)
settings.load_profile("tests")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
