"""Pass lower-attention: attention of few queries, as in decoding, by a kernel that reads every key once.

1. scaled_dot_product_attention(q, k, v, mask), no more queries than `MOST_QUERIES`  -> attend(q, k, v, mask, scale)
2. k or v repeated for the heads that share it: x[:, :, None].expand(...).reshape(...), repeat_interleave(x, n, 1), or
   enable_gqa                                                                        -> x itself
3. a mask that was expanded, m.expand(...)                                           -> m: layers then share one value
It does not fire in training, with dropout or a causal flag (which lets one query see one key only), where the number of
queries is not known, and where no target has a kernel. Rule 2 stops where something in place happens in between, rule
3 where anything writes into the mask.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from ptqc.attention import MOST_QUERIES, AttentionRequest
from ptqc.passes.lower.in_place import is_in_place, written
from ptqc.pipeline import Context, Pass
from ptqc.program import value_of
from ptqc.views import function_name, shape_of

__all__ = ["LowerAttention"]

_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_RESHAPES = frozenset({"reshape", "view", "flatten"})


@dataclass(frozen=True)
class LowerAttention(Pass):
    """Replace torch's attention where a kernel of ours serves."""

    name: ClassVar[str] = "lower-attention"

    def run(self, module: fx.GraphModule, context: Context) -> int:
        """Returns how many attentions were replaced."""
        nodes = [node for node in module.graph.nodes if function_name(node) == "scaled_dot_product_attention"]
        unsafe = written(module.graph)
        changed = sum(_replace(module.graph, node, context, unsafe) for node in nodes)
        if changed:
            _erase_dead_views(module.graph)
        return changed


def _replace(graph: fx.Graph, node: fx.Node, context: Context, unsafe: frozenset[fx.Node]) -> bool:
    given: dict[str, Any] = dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    q, k, v, mask = (given.get(name) for name in _PARAMETERS[:4])
    if given.get("dropout_p") or given.get("is_causal") or not all(isinstance(part, fx.Node) for part in (q, k, v)):
        return False
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node) and isinstance(v, fx.Node)
    values = [value_of(part) for part in (q, k, v)]
    if not all(isinstance(value, Tensor) and value.ndim == 4 for value in values):
        return False
    if torch.is_grad_enabled() and any(value.requires_grad for value in values):
        return False
    sizes = [_known(size) for size in (*values[0].shape[1:], values[2].shape[-1])]
    heads, queries, features, value_features = sizes
    if not all(isinstance(size, int) for size in sizes) or queries > MOST_QUERIES:
        return False
    scale = given.get("scale")
    scale = features**-0.5 if scale is None else scale
    masked = value_of(mask) if isinstance(mask, fx.Node) else None
    if not isinstance(scale, float) or (mask is not None and not isinstance(masked, Tensor)):
        return False
    attend = context.attention(
        AttentionRequest(
            values[0].dtype, features, value_features, None if masked is None else masked.dtype,
            values[0].device.type,
        )
    )  # fmt: skip
    if isinstance(attend, str) or len({value.dtype for value in values}) > 1:
        return False
    shared_k, shared_v = _unrepeated(k, node), _unrepeated(v, node)
    if _heads(shared_k) == _heads(shared_v):
        k, v = shared_k, shared_v
    if not isinstance(_heads(k), int) or _heads(k) != _heads(v) or heads % _heads(k):
        return False
    narrow = _unexpanded(mask, unsafe) if isinstance(mask, fx.Node) else None
    with graph.inserting_before(node):
        made = graph.call_function(attend, (q, k, v, narrow, scale))
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    graph.erase_node(node)
    return True


def _heads(node: fx.Node) -> Any:
    shape = shape_of(node)
    return _known(shape[1]) if shape is not None else None


def _known(size: Any) -> Any:
    """A size as a number if it is one by now: a symbol may have been found to be one after the value was noted."""
    found = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return size if found is None else found


def _unrepeated(node: fx.Node, reader: fx.Node) -> fx.Node:
    """[batch, heads of keys, keys, features] behind its repetition for the heads of the queries, else the node."""
    source = _repeated(node)
    if source is None:
        return node
    between = node
    while between is not reader:
        if is_in_place(between):
            return node
        between = between.next
    return source


def _repeated(node: fx.Node) -> fx.Node | None:
    """What `node` repeats along its axis of heads, each head several times in a row."""
    wide = node.args[0] if node.args else None
    if not isinstance(wide, fx.Node):
        return None
    source: fx.Node | None = None
    if function_name(node) == "repeat_interleave":
        given = dict(zip(("repeats", "dim"), node.args[1:], strict=False)) | dict(node.kwargs)
        source = wide if given.get("dim") == 1 and isinstance(given.get("repeats"), int) else None
    elif function_name(node) in _RESHAPES and function_name(wide) == "expand" and isinstance(wide.args[0], fx.Node):
        source = _without_new_axis(wide.args[0])
        shape, longer = (None, None) if source is None else (shape_of(source), shape_of(wide))
        if shape is None or longer is None or len(longer) != 5 or (*longer[:2], *longer[3:]) != shape:
            return None
    shape, after = None if source is None else shape_of(source), shape_of(node)
    if shape is None or after is None or len(shape) != 4 or len(after) != 4:
        return None
    return source if (shape[0], *shape[2:]) == (after[0], *after[2:]) else None


def _unexpanded(mask: fx.Node, unsafe: frozenset[fx.Node]) -> fx.Node:
    """What `mask` spreads along axes of one entry, which kernels do themselves."""
    source = mask.args[0] if mask.args else None
    if function_name(mask) != "expand" or not isinstance(source, fx.Node) or {mask, source} & unsafe:
        return mask
    return source


def _without_new_axis(node: fx.Node) -> fx.Node | None:
    """x of x[:, :, None] and x.unsqueeze(2), for x of four axes."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node) or len(shape_of(source) or ()) != 4:
        return None
    if function_name(node) == "unsqueeze":
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
        return source if axis in (2, -3) else None
    if function_name(node) != "getitem" or not isinstance(node.args[1], tuple):
        return None
    index, whole = node.args[1], slice(None, None, None)
    is_new = index[:3] == (whole, whole, None) and all(entry == whole for entry in index[3:])
    return source if is_new else None


def _erase_dead_views(graph: fx.Graph) -> None:
    """Erase what repeated keys and values for nobody any more."""
    names = _RESHAPES | {"expand", "getitem", "unsqueeze", "repeat_interleave"}
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method") and function_name(node) in names:
            graph.erase_node(node)
