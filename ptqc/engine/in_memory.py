"""The parameters of a model in memory while the engine works: changes are kept aside and take effect together.

Until `commit` the model is as it was, whatever fails in between.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from ptqc.engine.jobs import Job
from ptqc.qtensor import QuantTensor
from ptqc.sites import Site

__all__ = ["InMemory"]


class InMemory:
    """Float parameters of a model by name, with what the engine has made of them so far."""

    def __init__(self, model: nn.Module, sites: Iterable[Site], jobs: Iterable[Job]) -> None:
        self._model, self._parameters = model, dict(model.named_parameters())
        self._sites = {site.name: site for site in sites}
        self._wide = {job.name for job in jobs}
        self._changed: dict[str, Tensor] = {}
        self._stored: dict[str, QuantTensor] = {}

    def read(self, name: str) -> Tensor:
        """Weights that are to be quantized are held in float32 once a fold has changed them."""
        if name in self._changed:
            return self._changed[name]
        value = self._parameters[name].detach()
        return value.float() if name in self._wide else value

    def fold(self, name: str, value: Tensor) -> None:
        """Keep other values for a parameter."""
        self._changed[name] = value

    def store(self, name: str, weight: QuantTensor) -> None:
        """Keep the quantized form of a parameter; its float values are not needed again."""
        self._stored[name] = weight
        self._changed.pop(name, None)

    def current(self, name: str) -> Tensor:
        """The quantized form if there is one, else the floats in the parameter's own dtype."""
        if name in self._stored:
            return self._stored[name]
        own = self._parameters[name].detach()
        return self._changed[name].to(own.dtype) if name in self._changed else own

    def bias_of(self, name: str) -> str | None:
        """The bias beside a weight in the module that holds it, if no other module has the weight."""
        return self._sites[name].bias_in(self._model)

    @property
    def values(self) -> Mapping[str, Tensor]:
        """What to run the model with instead of its own parameters, by name."""
        return self._changed | self._stored

    def commit(self) -> dict[str, QuantTensor]:
        """Change the model: folded parameters in place, quantized ones in every owner. Returns the latter by name."""
        with torch.no_grad():
            for name, value in self._changed.items():
                self._parameters[name].data.copy_(value)
        for name, weight in self._stored.items():
            self._sites[name].replace(weight)
        return self._stored
