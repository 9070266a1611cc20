"""QuantTensor: a stored weight that stands in for an nn.Parameter.

    tensor      what it holds, and how it is a tensor
    rules       the table from operators of ATen to what is done instead
    products    linear, mm, addmm, bmm, embedding
    views       transposing, selecting and slicing
    copies      copying, moving, comparing
"""

from ptqc.qtensor import copies, products, views  # noqa: F401  (their rules)
from ptqc.qtensor.tensor import QuantTensor, _rebuild  # noqa: F401  (files of torch.save name it as if it were here)

__all__ = ["QuantTensor"]
