"""The README's server lines, run as they are written."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from support.live import Live, wait_ready

README = Path(__file__).parents[2] / "README.md"


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_server_lines_of_the_readme(tmp_path):
    if not port_is_free(8000):
        pytest.skip("port 8000 is in use")
    (block,) = re.findall(r"^```bash\n(.*?)^```$", README.read_text(encoding="utf-8"), re.M | re.S)
    start, _, calls = block.partition("&\n")
    assert start.split() == ["mili", "serve"]
    assert calls.count("curl ") == 1
    mili = tmp_path / "mili"  # whether or not the package is installed
    mili.write_text(f'#!/bin/sh\nexec {sys.executable} -m mili "$@"\n')
    mili.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with (tmp_path / "log").open("w+") as log:
        process = subprocess.Popen(start.split(), env=environment, stdout=log, stderr=log)
        try:
            wait_ready(Live("http://127.0.0.1:8000", process, log))
            done = subprocess.run(["bash", "-euc", calls], env=environment, capture_output=True, text=True, check=True)
        finally:
            process.terminate()
            process.wait(60)
    assert '"text":"' in done.stdout
    assert '"completion_tokens":32' in done.stdout
