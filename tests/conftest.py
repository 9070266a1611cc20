"""What every test may use: the reference model, and caches of its own."""

import os
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

REFERENCE = Path(__file__).parent.parent / "benchmarks" / "models" / "reference"


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory):
    """Generated kernels and Inductor's cache go to a folder of this run."""
    os.environ["PTQC_CACHE"] = str(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def seeded():
    """A seeded generator; the global one is seeded too."""
    torch.manual_seed(0)
    return torch.Generator().manual_seed(0)


@pytest.fixture
def reference_folder():
    """The folder of the embedded reference model."""
    return REFERENCE


@pytest.fixture
def reference_model():
    """The embedded reference model in float32, fresh."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(REFERENCE, dtype=torch.float32).eval()
