"""A hub on loopback that serves one repository from a dict, and can fail in the ways that the real one does."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


@dataclass
class FakeHub:
    """refuse: (status, X-Error-Code) of every answer; refuse_files: of the files alone.

    cut: a file that breaks off after half of its bytes. moves_to: the commit of `main` from its second listing on.
    """

    files: dict[str, bytes]
    repository: str = "owner/tiny"
    refuse: tuple[int, str] | None = None
    refuse_files: tuple[int, str] | None = None
    cut: str | None = None
    commit: str = COMMIT
    moves_to: str | None = None
    fetched: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self)

            def do_HEAD(self) -> None:
                hub.answer(self)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """The server is gone; a second time does nothing."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        api, resolve = f"/api/models/{self.repository}/", f"/{self.repository}/resolve/"
        if self.refuse:
            self._fail(request, *self.refuse)
        elif path.startswith((f"{api}revision/", f"{api}tree/")):
            kind, _, revision = path.removeprefix(api).partition("/")
            if revision not in ("main", self.commit):
                self._fail(request, 404, "RevisionNotFound")
            elif kind == "revision":
                siblings = [{"rfilename": name} for name in self.files]
                self._send(request, json.dumps({"id": self.repository, "sha": self.commit, "siblings": siblings}))
            else:
                self._send(request, json.dumps([self._entry(name) for name in self.files]))
                self.commit = self.moves_to or self.commit
        elif path.startswith(resolve):
            self._file(request, *path.removeprefix(resolve).split("/", 1))
        else:
            self._fail(request, 404, "RepoNotFound")

    def _entry(self, name: str) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(self.files[name]), "oid": _etag(self.files[name])}

    def _file(self, request: BaseHTTPRequestHandler, commit: str, name: str) -> None:
        if self.refuse_files:
            self._fail(request, *self.refuse_files)
            return
        if name not in self.files:
            self._fail(request, 404, "EntryNotFound")
            return
        data = self.files[name]
        if request.command == "GET":
            self.fetched.append(name)
        # "bytes=N-": huggingface_hub goes on where it was cut off.
        start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
        end = len(data) // 2 if self.cut == name else len(data)
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(request, data[start:end], headers, len(data) - start, 206 if start else 200)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        body: bytes | str,
        headers: Mapping[str, str] | None = None,
        length: int | None = None,
        status: int = 200,
    ) -> None:
        body = body.encode() if isinstance(body, str) else body
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(body) if length is None else length))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def _fail(self, request: BaseHTTPRequestHandler, status: int, code: str) -> None:
        request.send_response(status)
        request.send_header("X-Error-Code", code)
        request.send_header("X-Error-Message", f"no: {code}")
        request.send_header("Content-Length", "0")
        request.end_headers()


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


_SCRIPT = """
import sys
from mlxvlm.checkpoint.hub import resolve
from mlxvlm.errors import MlxvlmError
model, revision, weights = sys.argv[1:]
try:
    print(resolve(model, revision or None, weights=weights == "weights"))
except MlxvlmError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(error.exit_code)
"""


@dataclass(frozen=True)
class Answer:
    exit_code: int
    text: str

    @property
    def folder(self) -> Path:
        assert self.exit_code == 0, self.text
        return Path(self.text)

    @property
    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


def hub_environment(url: str, home: Path) -> dict[str, str]:
    """Variables of a process whose hub is at `url` and whose cache is in `home`."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return environment | {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "NO_PROXY": "127.0.0.1",
    }


def fetch(url: str, home: Path, model: str = "owner/tiny", revision: str = "", *, weights: bool = True) -> Answer:
    """resolve() in a process of its own, as huggingface_hub reads its settings at import."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, model, revision, "weights" if weights else "small"],
        env=hub_environment(url, home),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert "Traceback" not in done.stderr, done.stderr
    return Answer(done.returncode, done.stdout.removesuffix("\n"))
