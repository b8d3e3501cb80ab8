"""The page's files over HTTP: what is served, with which headers, and nothing else."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Match
from starlette.testclient import TestClient

from mlxvlm.server import page
from mlxvlm.server.page import routes

UI = files("mlxvlm.server").joinpath("ui")
NAMES = sorted(entry.name for entry in UI.iterdir())
TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}


def address(name: str) -> str:
    return "/" if name == "index.html" else f"/ui/{name}"


@pytest.fixture(scope="module")
def client() -> TestClient:
    return TestClient(Starlette(routes=routes()))


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_served(client: TestClient, name: str) -> None:
    response = client.get(address(name))
    assert response.status_code == 200
    assert response.content == UI.joinpath(name).read_bytes()
    assert response.headers["Content-Type"].split(";")[0] == TYPES[name.rsplit(".", 1)[1]]
    assert client.head(address(name)).headers["ETag"] == response.headers["ETag"]
    assert client.post(address(name)).status_code == 405


@pytest.mark.parametrize("name", NAMES)
def test_headers(client: TestClient, name: str) -> None:
    headers = client.get(address(name)).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data: blob:",
        "connect-src": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert headers["Cache-Control"] == "no-cache"


def test_a_known_file_is_not_sent_again(client: TestClient) -> None:
    etag = client.get("/").headers["ETag"]
    for known in (etag, f"W/{etag}", f'"other", {etag}'):
        response = client.get("/", headers={"If-None-Match": known})
        assert (response.status_code, response.content) == (304, b"")
        assert "Content-Security-Policy" in response.headers
    assert client.get("/", headers={"If-None-Match": '"other"'}).status_code == 200
    assert len({client.get(address(name)).headers["ETag"] for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize(
    "path",
    [
        *("/ui", "/ui/", "/ui/index.html", "/ui/none.js", "/ui/App.js", "/index.html", "/ui//app.js", "/page.py"),
        *("/ui/../page.py", "/ui/%2e%2e/page.py", "/ui/..%2fpage.py", "/ui/..%5cpage.py", "/ui/app.js%00"),
        *("/ui//etc/passwd", "/ui/%2fetc%2fpasswd", "/ui/....//page.py", "//etc/passwd", "/ui/app.js/"),
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    scope_path = client.get(path, follow_redirects=False)
    assert scope_path.status_code in (307, 404)
    assert client.get(path).status_code == 404 or path == "/ui/app.js/"  # Starlette leads back from a last slash


@pytest.mark.parametrize("path", ["/ui/../page.py", "/ui/../../errors.py", "/ui/app.js\0", "/ui/./app.js"])
def test_an_address_is_taken_as_it_stands(path: str) -> None:
    """Clients resolve dots before they ask; one that doesn't finds no route."""
    scope = {"type": "http", "method": "GET", "path": path, "headers": []}
    assert all(route.matches(scope)[0] is Match.NONE for route in routes())


def test_the_page_asks_for_nothing_from_elsewhere() -> None:
    for name in NAMES:
        text = UI.joinpath(name).read_text(encoding="utf-8")
        # The name of XML's vocabulary is no address to fetch.
        assert not re.search(r"https?://[\w-]+\.\w", text.replace("http://www.w3.org/2000/svg", "")), name
        assert not re.search(r"\w+HTML\b|document\.write|\beval\(|new Function", text.replace("parses HTML", "")), name


def test_every_file_that_is_named_exists() -> None:
    index = UI.joinpath("index.html").read_text(encoding="utf-8")
    named = set(re.findall(r'(?:src|href)="ui/([^"]+)"', index))
    for name in NAMES:
        named |= set(re.findall(r'from "\./([^"]+)"', UI.joinpath(name).read_text(encoding="utf-8")))
    assert named == set(NAMES) - {"index.html"}


def test_no_inline_script_or_style() -> None:
    index = UI.joinpath("index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|<script(?![^>]* src=)", index)


def test_the_page_is_small() -> None:
    def is_code(line: str) -> bool:
        return not re.match(r"\s*(//|/?\*|$)", line)

    lines = {name: sum(map(is_code, UI.joinpath(name).read_text(encoding="utf-8").splitlines())) for name in NAMES}
    assert max(lines.values()) <= 200, lines
    assert sum(lines.values()) < 1500, lines


def test_files_that_are_no_part_of_the_page_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "ui"
    folder.mkdir()
    for name in ("index.html", "app.js", ".DS_Store", "app.js~"):
        (folder / name).write_text("")
    monkeypatch.setattr(page, "files", lambda package: folder.parent)
    assert [route.path for route in page.routes()] == ["/ui/app.js", "/"]
