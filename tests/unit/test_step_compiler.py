"""Two graphs, two processes: what the second one makes is used, and without it all is compiled here."""

import logging
import stat
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mili import step_compiler
from mili.step_compiler import Target, compile_step

TARGET = Target("cpu", "here")


@pytest.fixture
def compiled(monkeypatch):
    """The graphs that are compiled in this process, by a compiler that returns their names."""
    graphs = []
    forward = SimpleNamespace(name="forward", kernel_libraries_paths=[Path("kernels.mojoc")])
    monkeypatch.setattr(step_compiler, "build_forward", lambda *args: forward)
    monkeypatch.setattr(step_compiler, "build_sampler", lambda *args: SimpleNamespace(name="sampler", args=args))
    monkeypatch.setattr(step_compiler, "_compile", lambda session, graph, target: graphs.append(graph) or graph.name)
    monkeypatch.setattr(step_compiler, "read", lambda file: file.read().decode())
    return graphs


def second_process(monkeypatch, folder: Path, code: str) -> None:
    """Let `code` be what the second process runs."""
    program = folder / "python"
    program.write_text(f"#!{sys.executable}\nimport os, pickle, sys, time\n{code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(program))


READ_JOB = "job = pickle.load(sys.stdin.buffer)"


def test_the_sampler_comes_from_the_second_process(compiled, monkeypatch, tmp_path):
    second_process(monkeypatch, tmp_path, f"{READ_JOB}\njob.output.write_text('from the child')")
    step = compile_step(None, None, "float32", 16, TARGET)
    assert (step.forward, step.sampler) == ("forward", "from the child")
    assert [graph.name for graph in compiled] == ["forward"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (f"{READ_JOB}\nraise SystemExit('no memory')", "no memory"),
        ("raise SystemExit('ended before it read')", "ended before it read"),
        ("os.kill(os.getpid(), 9)", "status -9"),
    ],
)
def test_a_second_process_that_fails_is_replaced_by_this_one(compiled, monkeypatch, tmp_path, caplog, code, reason):
    second_process(monkeypatch, tmp_path, code)
    with caplog.at_level(logging.WARNING):
        step = compile_step(None, None, "float32", 16, TARGET)
    assert (step.forward, step.sampler) == ("forward", "sampler")
    assert compiled[1].args[-1] == Path("kernels.mojoc")  # precompiled once
    assert f"the second process failed ({reason})" in caplog.text


def test_no_second_process_at_all(compiled, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    assert compile_step(None, None, "float32", 16, TARGET).sampler == "sampler"
    assert "no second process to compile in" in caplog.text


def test_the_second_process_does_not_outlive_a_failure_here(compiled, monkeypatch, tmp_path):
    second_process(monkeypatch, tmp_path, "time.sleep(60)")
    started = []
    popen = step_compiler.subprocess.Popen
    monkeypatch.setattr(
        step_compiler.subprocess, "Popen", lambda *args, **kw: started.append(popen(*args, **kw)) or started[0]
    )
    monkeypatch.setattr(step_compiler, "_compile", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        compile_step(None, None, "float32", 16, TARGET)
    assert started[0].returncode == -9
