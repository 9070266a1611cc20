"""Plans: what would be done, from a model, from one without weights, and from a folder."""

import json

import pytest
import torch
import transformers
from torch import nn

from ptqc.errors import PtqcError
from ptqc.plan import plan
from tests.tiny import MODELS, tiny


def weightless(name):
    """The same model on the meta device."""
    architecture, config, sizes = MODELS[name]
    with torch.device("meta"):
        return getattr(transformers, architecture)._from_config(getattr(transformers, config)(**sizes)).eval()


@pytest.fixture(scope="module")
def llama():
    return plan(tiny("plain"), "rtn", group_size=32)


def test_weights_with_sizes(llama):
    assert len(llama.weights) == 14
    up = next(weight for weight in llama.weights if weight.name == "model.layers.0.mlp.up_proj.weight")
    assert (up.shape, up.method, up.spec, up.activation) == ((128, 64), "rtn", "int4g32", "float")
    assert (up.nbytes, up.source_bytes) == (128 * 64 // 2 + 128 * 2 * 2, 128 * 64 * 4)
    assert llama.bits_per_weight == 4.5
    saved = sum(weight.source_bytes - weight.nbytes for weight in llama.weights)
    assert llama.source_bytes - llama.output_bytes == saved
    assert {entry.name for entry in llama.skipped} == {"model.embed_tokens.weight", "lm_head.weight"}


def test_groups_with_reasons(llama):
    folds = [group for group in llama.groups if group.kind == "fold"]
    assert ("model.layers.0.input_layernorm.weight",) in [group.producers for group in folds]
    assert all(group.reason for group in llama.groups if group.kind != "fold")
    assert llama.capture == "one graph"


def test_the_short_form_is_a_few_lines(llama):
    lines = llama.short().splitlines()
    assert 3 <= len(lines) <= 6
    assert lines[0] == "plan: 14 weights (14 x rtn int4g32), 4.5 bits per weight"
    assert "scale groups: " in lines[2]
    assert "1 an embedding" in lines[3]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["experts", "transposed"])
def test_a_model_without_weights_gets_the_same_plan(name):
    empty = weightless(name)
    found, expected = plan(empty, "rtn", group_size=32), plan(tiny(name), "rtn", group_size=32)
    assert (found.weights, found.groups, found.skipped) == (expected.weights, expected.groups, expected.skipped)
    assert found.output_bytes == expected.output_bytes
    assert all(parameter.is_meta for parameter in empty.parameters())


def test_a_folder_is_planned_without_its_weights(tmp_path, llama, monkeypatch):
    tiny("plain").save_pretrained(tmp_path / "model")
    monkeypatch.setattr("ptqc.folders.safefile.TensorEntry.pieces", None)
    found = plan(tmp_path / "model", "rtn", group_size=32)
    assert (found.weights, found.groups) == (llama.weights, llama.groups)


class Breaking(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)

    def forward(self, x):
        x = self.first(x)
        torch._dynamo.graph_break()
        return self.second(x)


def test_graph_breaks_are_told():
    found = plan(Breaking(), "rtn", group_size=16, batch={"x": torch.ones(2, 32)})
    assert found.capture.startswith("2 graphs (breaks: ")
    assert len(found.weights) == 2


class Failing(nn.Linear):
    def forward(self, x):
        raise ValueError("not today")


def test_a_model_that_does_not_trace_is_told():
    found = plan(nn.Sequential(Failing(32, 32)), "rtn", batch={"input": torch.ones(2, 32)})
    assert found.capture.startswith("no graph, module hooks instead (")
    assert (len(found.weights), found.groups) == (1, ())


def test_a_plain_module_needs_no_batch():
    found = plan(nn.Sequential(nn.Linear(64, 64)), "rtn", bits=8, exclude=["1"])
    assert found.capture.startswith("no graph (no example inputs")
    assert not found.is_empty
    assert plan(nn.Sequential(nn.Linear(64, 64)), "rtn", exclude=["0"]).is_empty


def test_a_spec_that_does_not_fit_names_the_weight():
    with pytest.raises(PtqcError, match=r'cannot store "0\.weight" as int4g48: group 48 does not divide'):
        plan(nn.Sequential(nn.Linear(64, 64)), "rtn", spec="int4g48")


def test_plans_are_plain_values(llama):
    document = json.loads(json.dumps(llama.to_json()))
    assert document["bits_per_weight"] == 4.5
    assert {"capture", "weights", "groups", "skipped", "output_bytes", "peak_bytes", "seconds"} <= set(document)
