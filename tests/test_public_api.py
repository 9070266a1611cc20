"""The public surface is what `__all__` says, and costs nothing until it is used."""

import subprocess
import sys

import pytest

import ptqc

PUBLIC = [
    "ActSpec", "PtqcConfig", "PtqcError", "QuantTensor", "WeightSpec", "auto", "export", "flatten_state_dict",
    "importance",
    "inventory", "load", "plan", "quantize", "report_of", "save", "unflatten_state_dict",
]  # fmt: skip


def test_exported_names():
    assert ptqc.__all__ == PUBLIC
    assert all(getattr(ptqc, name).__doc__ for name in PUBLIC)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        ptqc.quantise  # noqa: B018


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")


def test_import_is_cheap():
    done = run("import sys, ptqc; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy'")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("order", ["import ptqc, transformers", "import transformers, ptqc", "import ptqc.folders.hf"])
def test_transformers_learns_of_the_quantizer(order):
    done = run(
        f"{order}\nimport ptqc\nfrom transformers.quantizers import auto\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['ptqc'].__name__ == 'PtqcQuantizer'\n"
        "assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING['ptqc'] is ptqc.PtqcConfig"
    )
    assert done.returncode == 0, done.stderr
