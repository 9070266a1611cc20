import csv
import dataclasses
import io
import json
import math

import pytest

from ptqc.comparison import report
from ptqc.errors import PtqcError


@pytest.fixture
def no_pictures(monkeypatch):
    """Drawing takes seconds; these tests are about files."""
    monkeypatch.setattr(report, "to_png", lambda comparison: b"png")
    monkeypatch.setattr(report, "render", lambda comparison: "page")


def test_all_files_are_written(comparison, tmp_path):
    folder = report.write(comparison, tmp_path / "new" / "out")
    assert sorted(file.name for file in folder.iterdir()) == sorted(report.FILES)
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert "<!doctype html>" in (folder / "index.html").read_text(encoding="utf-8")
    assert sorted(file.name for file in folder.parent.iterdir()) == ["out"]


def test_the_table_reads_back(comparison):
    rows = list(csv.DictReader(io.StringIO(report.to_csv(comparison))))
    assert [row["label"] for row in rows] == ["float", *(run.label for run in comparison.runs)]
    assert float(rows[1]["kl"]) == 0.013
    assert rows[0]["kl"] == ""


def test_the_document_is_json_with_every_layer(comparison, tmp_path, no_pictures):
    document = json.loads((report.write(comparison, tmp_path / "out") / "results.json").read_text(encoding="utf-8"))
    assert document["window"] == 512
    assert document["float"]["perplexity"] == 41.7655
    assert [run["spec"] for run in document["runs"]][:2] == ["int4g64", "int4g64f"]
    assert document["runs"][0]["layers"][1] == {"name": "layers.1.<odd>.weight", "error": 0.2}


def test_infinite_perplexity_is_null(comparison):
    broken = dataclasses.replace(comparison.runs[0].evaluation, perplexity=math.inf, kl=math.nan)
    changed = dataclasses.replace(comparison, runs=(dataclasses.replace(comparison.runs[0], evaluation=broken),))
    assert report.as_document(changed)["runs"][0]["perplexity"] is None
    assert report.as_document(changed)["runs"][0]["kl"] is None


def test_results_are_only_replaced_when_asked(comparison, tmp_path, no_pictures):
    report.write(comparison, tmp_path)
    (tmp_path / "mine.txt").write_text("kept")
    with pytest.raises(PtqcError, match=r"already holds results\.csv, .*, index\.html; overwrite it"):
        report.write(comparison, tmp_path)
    report.write(dataclasses.replace(comparison, text="code"), tmp_path, overwrite=True)
    assert json.loads((tmp_path / "results.json").read_text())["text"] == "code"
    assert (tmp_path / "mine.txt").read_text() == "kept"


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PtqcError, match="is a file"):
        report.check_folder(tmp_path / "file")
    with pytest.raises(PtqcError, match="cannot be written to"):
        report.check_folder(tmp_path / "file" / "out")


def test_a_full_disk_leaves_nothing(comparison, tmp_path, monkeypatch, no_pictures):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Path, "write_bytes", full)
    with pytest.raises(PtqcError, match=r"cannot write the results to .*out: No space left on device"):
        report.write(comparison, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
