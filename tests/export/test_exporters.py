import errno
import logging
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from ptqc.codegen.exporters import EXPORTERS, ExportedTensor, ExportReport, Written, export
from ptqc.errors import ExportError, UnknownNameError

resource = pytest.importorskip("resource")
SEEN: list[str] = []


@dataclass(frozen=True)
class TwoFiles:
    """Writes the names of the weights into one of two files; refuses the `unwanted`; fails with `error` in between."""

    quant: str | None = None
    unwanted: tuple[str, ...] = ()
    error: BaseException | None = None

    suffix: ClassVar[str] = ".two"

    def refuses(self, name, weight):
        SEEN.append(name)
        return "unwanted" if name in self.unwanted else None

    def prepare(self, model, tokenizer):
        return lambda path: self.write(model, path)

    def write(self, model: nn.Module, path: Path) -> Written:
        path.write_text(" ".join(SEEN))
        if self.error is not None:
            raise self.error
        path.with_name(path.name + ".data").write_bytes(b"12345")
        return Written(tuple(ExportedTensor(name, name, "F32", "lossless", 4) for name in SEEN), ("a note",))


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(EXPORTERS._entries, "two-files", TwoFiles)
    SEEN.clear()
    return nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_all_files_appear_and_the_report_counts_them(tmp_path, model, caplog):
    with caplog.at_level(logging.INFO, "ptqc"):
        report = export(torch.compile(model), "two-files", tmp_path / "m.two")
    assert names(tmp_path) == ["m.two", "m.two.data"]
    assert (tmp_path / "m.two").read_text() == "0.weight 1.weight"
    assert (report.path, report.nbytes, report.notes) == (tmp_path / "m.two", 22, ("a note",))
    assert "2 F32 lossless" in str(report)
    assert str(report) in caplog.text


def test_every_weight_is_asked_about_before_anything_is_written(tmp_path, model):
    with pytest.raises(ExportError, match=r'cannot hold this model: "0.weight": unwanted; "1.weight": unwanted'):
        export(model, "two-files", tmp_path / "m.two", unwanted=("0.weight", "1.weight"))
    assert SEEN == ["0.weight", "1.weight"]
    assert names(tmp_path) == []


def test_weights_without_values_are_refused(tmp_path, model):
    with pytest.raises(ExportError, match=r"meta device"):
        export(model.to("meta"), "two-files", tmp_path / "m.two")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ExportError),
        (ExportError("later"), ExportError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path, model, error, kind):
    (tmp_path / "m.two").write_text("old")
    with pytest.raises(kind, match=r"No space left|later|^$"):
        export(model, "two-files", tmp_path / "m.two", error=error)
    assert names(tmp_path) == ["m.two"]
    assert (tmp_path / "m.two").read_text() == "old"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder nobody can write to")
def test_an_unwritable_folder_is_an_error(model):
    with pytest.raises(ExportError, match=r'cannot write "/proc/self/m.two"'):
        export(model, "two-files", "/proc/self/m.two")


def test_targets_that_cannot_be_files(tmp_path, model):
    with pytest.raises(ExportError, match=r"is a folder; name a file, for example .*model.two"):
        export(model, "two-files", tmp_path)
    with pytest.raises(ExportError, match=r'the folder ".*missing" does not exist'):
        export(model, "two-files", tmp_path / "missing" / "m.two")


def test_unknown_formats_and_options_name_the_known_ones(tmp_path, model):
    with pytest.raises(UnknownNameError, match=r"known: gguf, onnx"):
        export(model, "pdf", tmp_path / "m")
    with pytest.raises(ExportError, match=r"no option 'colour'; its options: quant, unwanted, error"):
        export(model, "two-files", tmp_path / "m", colour="red")


@pytest.mark.parametrize("package", ["gguf", "onnx", "onnxscript"])
def test_a_missing_package_says_what_to_install(tmp_path, package):
    format = package.removesuffix("script")
    code = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from torch import nn\nfrom ptqc.codegen.exporters import export\n"
        f"export(nn.Linear(1, 1), {format!r}, {str(tmp_path / 'm')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f'needs the package {package}, which is not installed: pip install "ptqc[{format}]"' in done.stderr
    assert names(tmp_path) == []


def test_a_file_that_outgrows_the_disk_leaves_nothing(tmp_path, model):
    """A real failing write: the system refuses files above the limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4, before[1]))
    try:
        with pytest.raises(ExportError, match=r"File too large"):
            export(model, "two-files", tmp_path / "m.two")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert names(tmp_path) == []


def test_a_report_is_readable():
    tensors = (ExportedTensor("a", "a", "Q4_0", "requantized", 18), ExportedTensor("b", "b", "Q4_0", "requantized", 18))
    text = str(ExportReport(Path("m.gguf"), "gguf", 1_500_000, tensors, ("one note", "another")))
    assert text == "m.gguf (gguf, 1.5 MB): 2 Q4_0 requantized\n  one note\n  another"
