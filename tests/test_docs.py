"""The pages of docs/ hold code that runs, and links that lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FILE = re.compile(r"<!-- file: (\S+) -->\n```\w+\n(.*?)```\n", re.DOTALL)

_QUANTIZE = """
import torch
import ptqc
from ptqc.methods import METHODS
from ptqc.transforms import TRANSFORMS

assert "weighted" in METHODS.names() and "balance" in TRANSFORMS.names()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.LayerNorm(64), torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32))
data = [{"input": torch.randn(128, 64) * torch.logspace(-1, 1, 64)} for _ in range(2)]
expected = model(**data[0])
ptqc.quantize(model, "balance+weighted", bits=6, steps=30, calibration=data, progress=False)
assert isinstance(model[1].weight, ptqc.QuantTensor)
error = (model(**data[0]) - expected).norm() / expected.norm()
assert error < 0.05, error
assert "folded" in [outcome.done for outcome in ptqc.report_of(model).groups]
print("quantized by a stranger")
"""


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The files of docs/write-a-method.md, as a folder."""
    folder = tmp_path_factory.mktemp("package")
    for name, text in _FILE.findall((ROOT / "docs" / "write-a-method.md").read_text(encoding="utf-8")):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "stranger" / "__init__.py").write_text("")
    return folder


def run(*words, path):
    # From another folder, in isolation: nothing but what is installed is found, and the path given.
    environment = {"PYTHONPATH": f"{path}:{ROOT}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd="/", env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_is_short(package):
    text = (package / "stranger" / "weighted.py").read_text()
    assert len([line for line in text.splitlines() if line.strip()]) < 60


@pytest.mark.parametrize("name", ["test_weighted.py", "test_balance.py"])
def test_the_example_keeps_its_promises(package, name):
    run(str(package / name), path=package)


@pytest.mark.slow
def test_an_installed_package_adds_a_method_and_a_transform(package, tmp_path):
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    run("-m", "pip", "install", *options, "--target", str(tmp_path / "site"), str(package), path=package)
    assert "quantized by a stranger" in run("-c", _QUANTIZE, path=tmp_path / "site")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), target
