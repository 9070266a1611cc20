"""Observe a whole model on calibration batches.

In this order, and the log says which was used: 1. every graph that dynamo makes of the model, with observers inserted,
executed as it is; 2. where dynamo fails, and for weights of linear modules that no graph showed, hooks on the modules.
Under torchrun every process observes its share of the batches and ends with the statistics of all of them.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from transformers.pytorch_utils import Conv1D

from ptqc.calibrate import moved, shard
from ptqc.errors import PtqcError
from ptqc.passes.observe.insert_observers import InsertObservers
from ptqc.passes.observe.layout import Layout
from ptqc.passes.observe.recorder import Recorder, Weight
from ptqc.pipeline import Context, Pipeline

__all__ = ["observe", "observed", "observed_graph"]

log = logging.getLogger("ptqc")

Progress = Callable[[int, int], None]
_Numbered = Sequence[tuple[int, Mapping[str, Any]]]


def observe(
    model: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    wanted: Mapping[Weight, Collection[str]],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> Recorder:
    """Run the model on all batches and gather the statistics that weights want.

    batches: inputs as keyword arguments; under torchrun all of them, on every process. wanted: names of statistics by
    parameter of the model, in the same order on every process. seed: of the sampled rows. progress: called with
    (batches done, batches of this process). The model is run in evaluation mode and is unchanged after.

    Raises: whatever the model itself raises on a batch.
    """
    if not batches:
        raise PtqcError("there is no calibration data to observe")
    mine = shard(batches)
    with _evaluating(model), torch.no_grad():
        recorder = _by_graphs(model, mine, wanted, seed, progress)
        if recorder is None:
            recorder = Recorder(wanted, seed=seed)
            _by_hooks(model, mine, recorder, recorder.parameters, progress)
        else:
            _complete(model, mine, recorder)
    recorder.all_reduce()
    _report(recorder)
    return recorder


def observed_graph(gm: fx.GraphModule, inputs: Sequence[Any], recorder: Recorder) -> fx.GraphModule:
    """A copy of dynamo's graph with observers. inputs: what it is called with; parameters are recognised among them."""
    pairs = zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)
    return observed(gm, {node: value for node, value in pairs if isinstance(value, nn.Parameter)}, recorder)


def observed(
    module: fx.GraphModule,
    parameters: Mapping[fx.Node, Tensor],
    recorder: Recorder,
    wanted: Collection[fx.Node] | None = None,
) -> fx.GraphModule:
    """A copy of a graph with observers. parameters: by their placeholders. wanted: placeholders, None for all."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    copied = fx.GraphModule(module, graph)
    own = {copies[node]: value for node, value in parameters.items()}
    chosen = None if wanted is None else {copies[node] for node in wanted}
    Pipeline([InsertObservers(own, recorder, chosen)]).run(copied, Context())
    return copied


def _by_graphs(
    model: nn.Module,
    batches: _Numbered,
    wanted: Mapping[Weight, Collection[str]],
    seed: int,
    progress: Progress | None,
) -> Recorder | None:
    """None where dynamo fails on the model."""
    recorder = Recorder(wanted, seed=seed)
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(observed_graph(gm, inputs, recorder))
        return graphs[-1].forward

    limits = torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
    torch._dynamo.reset()
    try:
        with limits:
            _run(torch.compile(model, backend=backend), model, batches, recorder, progress)
    except Exception as error:  # anything: dynamo executes the model's own code
        reason = (str(error).strip().splitlines() or [""])[0]
        log.warning("observing by module hooks, since dynamo fails: %s: %s", type(error).__name__, reason)
        return None
    finally:
        torch._dynamo.reset()
    log.info("observed %d batch(es) through %d graph(s)", len(batches), len(graphs))
    return recorder


def _run(
    call: Callable[..., Any], model: nn.Module, batches: _Numbered, recorder: Recorder, progress: Progress | None
) -> None:
    device = next((weight.device for weight in model.parameters()), torch.device("cpu"))
    for done, (number, batch) in enumerate(batches, 1):
        inputs = moved(batch, device)
        recorder.begin(number, inputs)
        call(**inputs)
        if progress is not None:
            progress(done, len(batches))


def _complete(model: nn.Module, batches: _Numbered, recorder: Recorder) -> None:
    """Observe weights of linear modules that no graph showed, if the first batch reaches any of them by its module."""
    missing = [weight for weight in recorder.parameters if not recorder.key(weight)]
    if not missing or not batches:
        return
    _by_hooks(model, batches[:1], recorder, missing, None)
    reached = [weight for weight in missing if recorder.key(weight)]
    if reached:
        log.info("observing %d weight(s) that no graph shows by module hooks", len(reached))
        _by_hooks(model, batches[1:], recorder, missing, None)


def _by_hooks(
    model: nn.Module, batches: _Numbered, recorder: Recorder, weights: Sequence[Tensor], progress: Progress | None
) -> None:
    numbers = {id(weight) for weight in weights}
    handles = [
        module.register_forward_pre_hook(partial(_hook, recorder))
        for module in model.modules()
        if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) in numbers
    ]
    try:
        _run(model, model, batches, recorder, progress)
    finally:
        for handle in handles:
            handle.remove()
    known = {id(module.weight) for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))}
    others = [weight for weight in weights if id(weight) not in known]
    recorder.note(others, "no matrix product that reads it was seen")


def _hook(recorder: Recorder, module: nn.Module, arguments: tuple[Any, ...]) -> None:
    if arguments and isinstance(arguments[0], Tensor) and isinstance(module.weight, Tensor):
        recorder.take(arguments[0], [module.weight], Layout())


def _report(recorder: Recorder) -> None:
    """Log what was not observed, by reason."""
    found: dict[str, int] = {}
    for weight in recorder.parameters:
        reason = recorder.reason(weight)
        if reason is not None:
            found[reason] = found.get(reason, 0) + 1
    for reason, count in found.items():
        log.warning("%d weight(s) not observed: %s", count, reason)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
