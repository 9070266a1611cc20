"""lower-experts: each rule, where it stops, and the values."""

import pytest
import torch
import transformers
import transformers.integrations.moe
from torch import nn

import ptqc
from ptqc.methods import METHODS, quantize_weight
from ptqc.spec import WeightSpec
from tests.lower._graphs import lower

EXPERTS, ROWS = 5, 7


def stack(shape, name="int4g32", is_transposed=False):
    weight, spec = torch.randn(shape, generator=torch.Generator().manual_seed(2)), WeightSpec.parse(name)
    method = METHODS.get("rtn" if spec.vector == 1 else "quip_sharp")()
    statistics = {"hessian": torch.eye(64).expand(shape[0], 64, 64)}
    stored = quantize_weight(weight, method, spec, is_transposed=is_transposed, statistics=statistics)
    return nn.Parameter(stored, requires_grad=False)


class Uses(nn.Module):
    """A stack of experts, used as the test says."""

    def __init__(self, weight, use):
        super().__init__()
        self.weight, self.use = weight, use

    def forward(self, x, at):
        return self.use(x, self.weight, at)


FALLBACK = torch.ops.transformers.grouped_mm_fallback  # transformers.integrations.moe makes it
X = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([0, 3, 3, 6, 7], dtype=torch.int32)
IDS = torch.tensor([4, 0, 2, 4, 1, 0, 3])
FORMS = {
    "fallback": (False, OFFSETS, lambda x, w, at: FALLBACK(x, w.transpose(-2, -1), at)),
    "keyword offsets": (False, OFFSETS, lambda x, w, at: FALLBACK(x, w.mT, offs=at)),
    "[in, out]": (True, OFFSETS, lambda x, w, at: FALLBACK(x, w, at)),
    "chosen": (False, IDS, lambda x, w, at: torch.bmm(w[at], x.unsqueeze(-1)).squeeze(-1)),
    "chosen, [in, out]": (True, IDS, lambda x, w, at: torch.bmm(x.unsqueeze(1), w[at]).squeeze(1)),
    "chosen, matmul": (False, IDS, lambda x, w, at: (w[at] @ x[:, :, None])[..., 0]),
}


@pytest.mark.parametrize("spec", ["int4g32", "nf4g64", "int8", "e8p"])
@pytest.mark.parametrize("form", FORMS)
def test_rules(form, spec):
    is_transposed, at, use = FORMS[form]
    model = Uses(stack((EXPERTS, 64, 96) if is_transposed else (EXPERTS, 96, 64), spec, is_transposed), use)
    expected = use(X, model.weight.dequantize(), at)
    done = lower(model, X, at, exact=True)
    assert done.counts["lower-experts"] == 1
    assert [call for call in done.calls if call.endswith("_experts.default")]
    assert "ptqc.dequantize.default" not in done.calls
    torch.testing.assert_close(done.output, expected, rtol=1e-4, atol=1e-4)


def test_rows_behind_the_last_end_are_zeros_and_experts_without_rows_are_not_read():
    model = Uses(stack((EXPERTS, 96, 64)), FORMS["fallback"][2])
    at = torch.tensor([0, 2, 2, 5, 5], dtype=torch.int32)
    done = lower(model, X, at, exact=True)
    assert (done.output[5:] == 0).all() and (done.output[:5] != 0).any(1).all()


@pytest.mark.parametrize(
    ("use", "shape"),
    [
        (lambda x, w, at: torch.bmm(w[at], x.unsqueeze(-1).expand(-1, -1, 2)), (EXPERTS, 96, 64)),  # two rows for each
        (lambda x, w, at: torch.einsum("si,soi->so", x, w[at]), (EXPERTS, 96, 64)),
        (lambda x, w, at: torch.bmm(w[at], x.unsqueeze(-1)), (EXPERTS, 24, 64)),  # 24 rows are no whole column blocks
    ],
)
def test_what_is_left_to_lower_linears(use, shape):
    model = Uses(stack(shape), use)
    expected = use(X, model.weight.dequantize(), IDS)
    done = lower(model, X, IDS, exact=True)
    assert done.counts["lower-experts"] == 0
    assert "ptqc.dequantize.default" in done.calls
    torch.testing.assert_close(done.output, expected, rtol=1e-4, atol=1e-4)


def test_it_does_not_fire_where_a_derivative_is_asked_for():
    model = Uses(stack((EXPERTS, 96, 64)), FORMS["fallback"][2])
    done = lower(model, X.clone().requires_grad_(), OFFSETS, exact=True, needs_grad=True)
    assert done.counts["lower-experts"] == 0


SIZES = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
         "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 32}  # fmt: skip


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_a_language_model_with_experts_holds_them_once_and_generates(family):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **SIZES, num_experts=4, num_local_experts=4, num_experts_per_tok=2, eos_token_id=None, pad_token_id=0
    )
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ptqc.quantize(model, "rtn", spec="int4g32", progress=False)
    ids = torch.randint(0, 128, (2, 5))
    stacks = {name: weight for name, weight in model.named_parameters() if weight.ndim == 3}
    assert len(stacks) == 2
    stored = {name: {part: value.clone() for part, value in weight.parts.items()} for name, weight in stacks.items()}
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    with torch.no_grad():
        logits = model(ids).logits
        compiled = torch.compile(model, backend="ptqc", options={"exact": True})
        torch.testing.assert_close(compiled(ids).logits, logits, rtol=1e-4, atol=1e-4)
    table = str(ptqc.backend.kernel_table(model))
    assert all(name in table for name in stacks)
    assert all("codes" in weight.given_up for weight in stacks.values())
    for name, weight in stacks.items():
        assert all(torch.equal(weight.parts[part], value) for part, value in stored[name].items())
        assert torch.equal(weight[1].dequantize(), weight.dequantize()[1])
    assert torch.equal(compiled.generate(ids, max_new_tokens=6, do_sample=False), expected)
