"""Model names become folders: bundled, local, cached, downloaded from a stand-in hub, or one clear error.

``huggingface_hub`` reads its environment once, at import, so everything that reaches it runs in a process of its own.
"""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mili.errors import ConfigError
from mili.models.hub import BUNDLED_MODEL, resolve_model

COMMIT = "0123456789abcdef0123456789abcdef01234567"
NAME = "someone/tiny"
WANTED = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights",
}
UNWANTED = {"README.md": b"text", "pytorch_model.bin": b"pickle", "original/model.safetensors": b"second copy"}
FILES = WANTED | UNWANTED


def oid(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """Just enough of the hub: one repository with one branch and one tag, one gated, everything else unknown."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.paths.append(self.path)  # type: ignore[attr-defined]
        path = self.path.split("?")[0]
        if path.startswith("/api/models/someone/gated"):
            return self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        if not path.removeprefix("/api/models").startswith(f"/{NAME}/"):
            return self.answer(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        if path in (f"/api/models/{NAME}/revision/{revision}" for revision in ("main", "v1", COMMIT)):
            siblings = [{"rfilename": name} for name in FILES]
            return self.answer(200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode())
        if path.startswith(f"/api/models/{NAME}/revision/"):
            return self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if path == f"/api/models/{NAME}/tree/{COMMIT}":  # newer clients list the files here
            tree = [{"type": "file", "path": name, "size": len(data), "oid": oid(data)} for name, data in FILES.items()]
            return self.answer(200, json.dumps(tree).encode())
        content = FILES.get(path.removeprefix(f"/{NAME}/resolve/{COMMIT}/"))
        if content is None:
            return self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        self.answer(200, content, {"ETag": f'"{oid(content)}"', "X-Repo-Commit": COMMIT})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.daemon_threads = True
    server.paths = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def resolve(home: Path, port: int, *arguments: object, offline: bool = False, **options: object) -> str:
    """``resolve_model`` in a new process with its own HF_HOME; the folder, or "ConfigError: message"."""
    code = (
        "from mili.models.hub import resolve_model\n"
        "from mili.errors import ConfigError\n"
        f"try: print(resolve_model(*{arguments!r}, **{options!r}))\n"
        "except ConfigError as error: print('ConfigError:', error)\n"
    )
    env = {name: value for name, value in os.environ.items() if not name.upper().endswith("_PROXY")}
    env |= {"HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HUB_DISABLE_TELEMETRY": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_OFFLINE": str(int(offline)), "HF_HUB_ETAG_TIMEOUT": "2"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def files(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    assert root.is_dir(), folder
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_local_folders_need_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_model() == BUNDLED_MODEL
    assert (BUNDLED_MODEL / "config.json").exists()
    assert resolve_model(tmp_path) == resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "someone" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve_model(NAME) == Path(NAME)  # a folder wins over a repository of the same name
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("~/someone/tiny") == tmp_path / "someone" / "tiny"


@pytest.mark.parametrize("name", ["nothing", "./nothing", "../no/thing", "/no/such/folder", "a/b/c", "own er/name"])
def test_what_is_neither_folder_nor_repository(name: str) -> None:
    with pytest.raises(ConfigError, match=r"neither a folder .* nor a hub name"):
        resolve_model(name)


def test_no_name_is_not_the_working_folder() -> None:
    with pytest.raises(ConfigError, match="model is empty"):
        resolve_model("")


def test_a_path_is_never_a_repository() -> None:
    with pytest.raises(ConfigError, match="neither a folder"):
        resolve_model(Path(NAME))


def test_files_and_revisions_of_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ConfigError, match="is a file"):
        resolve_model(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="revision 'main' is for hub models"):
        resolve_model(tmp_path, "main")


def test_download_then_offline(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    folder = resolve(tmp_path, hub.server_port, NAME)
    assert files(folder) == WANTED
    assert Path(folder).is_relative_to(tmp_path)  # HF_HOME is honoured
    asked = len(hub.paths)  # type: ignore[attr-defined]
    assert resolve(tmp_path, hub.server_port, NAME, offline=True) == folder
    assert len(hub.paths) == asked  # type: ignore[attr-defined]


def test_revision_and_small_files_only(tmp_path: Path, hub: ThreadingHTTPServer) -> None:
    folder = resolve(tmp_path, hub.server_port, NAME, "v1", weights=False)
    assert set(files(folder)) == set(WANTED) - {"model.safetensors"}
    assert f"/api/models/{NAME}/revision/v1" in hub.paths  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("someone/absent",), ["someone/absent", "is not on", "HF_TOKEN"]),
        ((NAME, "v9"), ["no revision 'v9'"]),
        (("someone/gated",), ["gated", "HF_TOKEN"]),
    ],
)
def test_what_the_hub_refuses(
    tmp_path: Path, hub: ThreadingHTTPServer, arguments: tuple[str, ...], parts: list[str]
) -> None:
    answer = resolve(tmp_path, hub.server_port, *arguments)
    assert all(part in answer for part in ["ConfigError:", *parts])


def test_offline_and_not_cached(tmp_path: Path) -> None:
    answer = resolve(tmp_path, 9, NAME, offline=True)
    assert all(part in answer for part in ("ConfigError:", NAME, "HF_HUB_OFFLINE", str(tmp_path)))


def test_no_network(tmp_path: Path) -> None:
    answer = resolve(tmp_path, 9, NAME)  # nothing listens on the discard port
    assert all(part in answer for part in ("ConfigError:", "cannot download", NAME, "check the network"))
