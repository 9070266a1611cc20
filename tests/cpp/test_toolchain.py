"""Compiling at run time: the cache among processes, damaged files, and no compiler at all."""

import os
import subprocess
import sys

import pytest
import torch

from ptqc.codegen import build
from ptqc.codegen.build import kernel_for
from ptqc.codegen.cpp import toolchain
from ptqc.codegen.cpp.toolchain import compile_library, compiler, missing_tools
from ptqc.errors import PtqcError
from ptqc.requests import KernelRequest
from ptqc.spec import WeightSpec
from tests.cpp._run import case

TEXT = 'extern "C" int answer() { return 42; }\n'
needs_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PTQC_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def fresh():
    def forget():
        for cached in (kernel_for, build._first, missing_tools):
            cached.cache_clear()

    forget()
    yield
    forget()


@needs_compiler
def test_a_library_is_compiled_once(cache, monkeypatch):
    assert compile_library(TEXT, ()).result().answer() == 42
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(toolchain, "_compile", lambda *arguments: pytest.fail("compiled again"))
    assert compile_library(TEXT, ()).result().answer() == 42


@needs_compiler
@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[: len(data) // 2],
                                    lambda data: data[:600] + b"\0" * 64 + data[664:]])  # fmt: skip
def test_a_damaged_library_is_made_again(cache, damage):
    text = TEXT.replace("42", "43")
    made = toolchain._build(compiler(), text, ())
    (file,) = cache.glob("k_*.so")
    whole = file.read_bytes()
    del made
    file.unlink()  # the loaded one keeps its bytes
    file.write_bytes(damage(whole))
    assert toolchain._build(compiler(), text, ()).answer() == 43
    assert toolchain._is_whole(file)


@needs_compiler
def test_what_does_not_compile_says_what_the_compiler_said(cache):
    with pytest.raises(PtqcError, match="no_such_thing"):
        compile_library('extern "C" int answer() { return no_such_thing; }\n', ()).result()
    assert not list(cache.iterdir())


@needs_compiler
def test_two_processes_share_the_cache(cache):
    code = (
        "from tests.cpp._run import case, error; made = case('int4g32', 64, 64)\n"
        "assert error(made.run(), made.expected()) < 1.2e-2"
    )
    environment = os.environ | {"PTQC_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    runs = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [run.wait(300) for run in runs] == [0, 0]
    assert len(list(cache.glob("k_*.so"))) == 2  # the kernel, and what tries the compiler
    assert not [path for path in cache.iterdir() if path.suffix not in (".so", ".py") and path.name != "__pycache__"]


def test_without_a_compiler_others_serve_and_it_is_said_once(monkeypatch, caplog, fresh):
    monkeypatch.setenv("CXX", "no-such-compiler")
    requests = [KernelRequest(WeightSpec.parse("int4g32"), n, 64, torch.bfloat16, "cpu") for n in (32, 64)]
    assert {kernel_for(request).target for request in requests} == {"aten_int4"}
    assert "install g++ or set CXX" in dict(kernel_for(requests[0]).refusals)["cpp"]
    assert caplog.text.count("no-such-compiler") == 1
    with pytest.raises(PtqcError, match="install g"):
        compile_library(TEXT, ())


def test_a_compiler_that_fails_is_a_reason_too(monkeypatch, cache, fresh):
    false = "/bin/false" if os.path.exists("/bin/false") else "/usr/bin/false"
    monkeypatch.setenv("CXX", false)
    assert f"{false} makes no library" in dict(kernel_for(case("int4g32", 48, 64).request).refusals)["cpp"]
