"""Readers against files that lie: what they cannot read they refuse in one line, soon, and without the memory that
the file announces."""

import shutil
import time
from collections.abc import Iterable, Iterator
from random import Random

import pytest
import torch

from ptqc.errors import CheckpointError
from tests.hostile.limits import TooSlowError, bounded, fault_of
from tests.hostile.readers import READERS, Attack, scratch

_SHARE, _SLOW_SHARE, _ALL = 50, 10, 10_000


@pytest.fixture(scope="module", params=READERS)
def reader(request) -> Iterator[tuple[str, Attack]]:
    folder = scratch()
    yield request.param, READERS[request.param].prepare(folder)
    shutil.rmtree(folder)


def faults(name: str, attack: Attack, cases: Iterable[int]) -> dict[int, str]:
    """What goes wrong, by the number of the case, which is all that a case depends on."""
    found = {case: fault_of(attack(Random(f"{name} {case}"))) for case in cases}
    return {case: fault for case, fault in found.items() if fault is not None}


def test_a_share_of_the_cases(reader):
    name, attack = reader
    assert faults(name, attack, range(_SLOW_SHARE if READERS[name].is_slow else _SHARE)) == {}


@pytest.mark.sweep
def test_ten_thousand_cases(reader):
    assert faults(*reader, range(_ALL)) == {}


def test_some_damage_does_no_harm_and_the_rest_is_noticed_in_many_places(reader):
    endings = set()
    for case in range(60):
        try:
            reader[1](Random(case))()
            endings.add("read")
        except Exception as error:
            endings.add(str(error)[-25:])
    assert "read" in endings and len(endings) >= 4


def _refuse(text: str) -> None:
    raise CheckpointError(text)


def _work(seconds: float) -> None:
    started = time.perf_counter()
    while time.perf_counter() < started + seconds:
        pass


def test_what_is_a_fault():
    assert fault_of(lambda: 1) is None
    assert fault_of(lambda: _refuse("the file holds 3 bytes, not 4; save it again")) is None
    assert "one line" in str(fault_of(lambda: _refuse("bad file")))
    assert "too much memory" in str(fault_of(lambda: _refuse("you tried to allocate memory of 3 TB; get more")))
    assert "ValueError" in str(fault_of(lambda: int("x")))
    assert "RuntimeError" in str(fault_of(lambda: torch.empty(1 << 40, dtype=torch.uint8)))
    with pytest.raises(TooSlowError), bounded(seconds=0.05):
        _work(60)
