import pytest
import torch
from torch import nn

from ptqc.errors import CheckpointError
from ptqc.folders.checkpoint import load, save
from ptqc.methods import quantize_weight
from ptqc.passes.methods.rtn import RoundToNearest
from ptqc.qtensor import QuantTensor
from ptqc.spec import WeightSpec


class Net(nn.Module):
    """A module of no library, with a tied weight, buffers of both kinds, a bare matrix and an integer one."""

    def __init__(self, width: int = 64, is_tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.body = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 32, bias=False)
        self.bare = nn.Parameter(torch.randn(width, width))
        self.register_buffer("scratch", torch.ones(3), persistent=False)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.norm(torch.relu(self.body(self.embed(ids))) @ self.bare) * self.scratch.sum())


def quantized_net() -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    net.norm.running_mean += 0.1
    for module in (net.body, net.embed):
        weight = quantize_weight(module.weight, RoundToNearest(), WeightSpec.parse("int4g32z"))
        module.weight = nn.Parameter(weight, requires_grad=False)
    net.head.weight = net.embed.weight
    bare = quantize_weight(net.bare, RoundToNearest(), WeightSpec.parse("int8g32"), is_transposed=True)
    net.bare = nn.Parameter(bare, requires_grad=False)
    return net


IDS = torch.arange(20)


def test_a_plain_module_is_saved_and_filled_again_bit_for_bit(tmp_path):
    net = quantized_net()
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", model=Net().eval())
    assert torch.equal(again(IDS), net(IDS))
    assert again.head.weight is again.embed.weight
    assert again.bare.is_transposed
    assert again.body.bias.requires_grad
    save(again, tmp_path / "twice")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "net" / name).read_bytes()


def test_ties_come_back_even_if_the_skeleton_has_none(tmp_path):
    save(quantized_net(), tmp_path / "net")
    again = load(tmp_path / "net", model=Net(is_tied=False).eval())
    assert again.head.weight is again.embed.weight


def test_dtype_changes_what_weights_pretend_to_be_and_not_their_parts(tmp_path):
    net = quantized_net()
    save(net, tmp_path / "net")
    again = load(tmp_path / "net", model=Net().eval(), dtype=torch.bfloat16)
    assert again.norm.weight.dtype == again.body.weight.dtype == torch.bfloat16
    assert again.norm.num_batches_tracked.dtype == torch.int64
    for name, part in again.body.weight.parts.items():
        assert torch.equal(part, net.body.weight.parts[name])


def test_a_skeleton_on_the_meta_device_is_filled_or_refused(tmp_path):
    save(quantized_net(), tmp_path / "net")
    with torch.device("meta"):
        skeleton = Net()
    with pytest.raises(CheckpointError, match=r"no values for scratch .*build the skeleton on the cpu"):
        load(tmp_path / "net", model=skeleton)
    assert isinstance(skeleton.body.weight, QuantTensor)


@pytest.mark.parametrize(
    ("skeleton", "complaint"),
    [
        (nn.Linear(4, 4), r"2 tensors missing \['weight', 'bias'\], \d+ too many"),
        (Net(width=32), "the skeleton has"),
    ],
)
def test_another_module_is_refused(tmp_path, skeleton, complaint):
    save(quantized_net(), tmp_path / "net")
    with pytest.raises(CheckpointError, match=complaint):
        load(tmp_path / "net", model=skeleton)


def test_recurrent_modules_compute_with_what_was_loaded(tmp_path):
    torch.manual_seed(0)
    saved, x = nn.LSTM(16, 16), torch.randn(3, 2, 16)
    save(saved, tmp_path / "model")
    filled = load(tmp_path / "model", model=nn.LSTM(16, 16))
    assert torch.equal(filled(x)[0], saved(x)[0])
