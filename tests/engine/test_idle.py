"""A model that was used and has nothing to do uses next to no processor time."""

import subprocess
import sys

import pytest

# In a process of its own: MAX's threads are the process's, and the first execution starts them.
PROGRAM = """
import asyncio, sys, time
from pathlib import Path
from mili import LLM, AsyncLLM, SamplingParams, runtime_threads

def busiest():
    "Share of a core, over a second, of the busiest thread."
    def seconds():
        return {t: int((t / "schedstat").read_text().split()[0]) / 1e9 for t in Path("/proc/self/task").iterdir()}
    first = seconds()
    time.sleep(1)
    return max(value - first.get(task, 0.0) for task, value in seconds().items())

if sys.argv[1:] == ["planted"]:
    runtime_threads._LATE_NS = runtime_threads._EXACT_NS
params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
with LLM() as llm:
    llm.generate([5, 6], params, use_tqdm=False)
    time.sleep(0.5)  # workers look for more to do for a moment before they sleep
    print(busiest())
llm = AsyncLLM()
asyncio.run(llm.complete([5, 6], params))
time.sleep(0.5)
print(busiest())
llm.close()
"""


def shares_of_a_core(*args: str) -> list[float]:
    command = [sys.executable, "-c", PROGRAM, *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return [float(line) for line in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_model_at_rest_uses_under_one_percent_of_a_core():
    assert max(shares_of_a_core()) < 0.01


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_measurement_sees_a_thread_that_polls():
    assert shares_of_a_core("planted")[0] > 0.02


NICENESS = """
import os
from pathlib import Path
from mili import LLM

with LLM(), LLM():
    found = {task.name: (task / "comm").read_text() for task in Path("/proc/self/task").iterdir()}
    nicer = {name for name in found if os.getpriority(os.PRIO_PROCESS, int(name)) > os.getpriority(os.PRIO_PROCESS, 0)}
    print({os.getpriority(os.PRIO_PROCESS, int(name)) - os.getpriority(os.PRIO_PROCESS, 0) for name in nicer})
    print(nicer == {name for name, comm in found.items() if "Thread" in comm})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_workers_and_no_other_threads_give_way():
    command = [sys.executable, "-c", NICENESS]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True).stdout.splitlines()
    assert lines == ["{5}", "True"]  # five for two models as for one
