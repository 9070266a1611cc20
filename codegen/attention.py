"""From a request for attention to an operator: C++ on the CPU; elsewhere torch's own serves."""

import logging
from functools import cache

from ptqc.attention import Attend, AttentionRequest
from ptqc.codegen.cpp.attend import attend_in_cpp

__all__ = ["attention_for"]

log = logging.getLogger("ptqc")


@cache
def attention_for(request: AttentionRequest) -> Attend | str:
    """The operator for a request, or why torch's attention is kept."""
    found = attend_in_cpp(request)
    log.info("%s: %s", request, found if isinstance(found, str) else "C++")
    return found
