"""`mlxvlm serve`: flags, files of flags, and the process from its first line to its exit code."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from mlxvlm.cli import main, parser, serve
from mlxvlm.errors import UsageError
from mlxvlm.server.registry import ModelSpec
from mlxvlm.server.settings import ServerSettings
from tests.fakes import eventually

ENGINE = {"context_shift": False}  # what is always told
ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(serve.API_KEY_VARIABLE, raising=False)


def read(*argv: str) -> tuple[ServerSettings, list[ModelSpec]]:
    args: argparse.Namespace = parser().parse_args(["serve", *argv])
    flags, tables = serve.merged(args)
    return serve.settings_of(flags), serve.specs_of(flags, tables, args.parser)


def config(tmp_path: Path, text: str) -> str:
    path = tmp_path / "server.toml"
    path.write_text(text)
    return str(path)


def test_defaults() -> None:
    settings, specs = read("-m", "demo")
    assert settings == ServerSettings()
    assert [(spec.name, spec.model, spec.aliases) for spec in specs] == [("demo", "demo", ())]
    assert (specs[0].source, specs[0].limits) == ({}, ENGINE)
    assert (specs[0].options.dtype, specs[0].options.isq, specs[0].options.requantize) == ("auto", None, "8@32")


def test_as_the_documents_write_it() -> None:
    settings, [spec] = read("vision", "-p", "4321", "--isq", "4", "-m", "meta-llama/Llama-4-Scout-17B-16E-Instruct")
    assert settings.port == 4321
    assert spec.name == spec.model == "meta-llama/Llama-4-Scout-17B-16E-Instruct"
    assert spec.options.isq == "4"


def test_all_flags(tmp_path: Path) -> None:
    settings, _ = read(
        *("-m", "demo", "--host", "0.0.0.0", "--api-key", "key", "--allowed-host", "a", "--allowed-host", "b"),
        *("--cors-origin", "https://page.example", "--allow-private-urls", "--image-root", str(tmp_path), "--log-json"),
        *("--max-body-mb", "1.5", "--max-connections", "7", "--idle-unload", "9", "--drain", "0", "--no-ui"),
        *("--enable-search", "--search-url", "http://localhost:8080/?q={query}", "--max-tool-rounds", "3"),
        *("--mcp-config", str(tmp_path / "mcp.json")),
    )
    assert settings == ServerSettings(
        host="0.0.0.0",
        api_key="key",
        allowed_hosts=("a", "b"),
        cors_origins=("https://page.example",),
        allow_private_urls=True,
        image_root=tmp_path,
        max_body_bytes=1_500_000,
        max_connections=7,
        idle_unload_s=9,
        drain_s=0,
        log_json=True,
        ui=False,
        enable_search=True,
        search_url="http://localhost:8080/?q={query}",
        max_tool_rounds=3,
        mcp_config=tmp_path / "mcp.json",
    )


def test_limits_of_the_engine() -> None:
    _, [spec] = read(
        *("-m", "demo", "--max-rows", "3", "--max-queue", "4", "--max-images", "5", "--request-timeout", "6"),
        *("--max-memory", "2", "--revision", "main"),
    )
    assert spec.limits == {
        "max_rows": 3,
        "max_queue": 4,
        "max_images": 5,
        "timeout_s": 6,
        "max_memory_bytes": 2_000_000_000,
        **ENGINE,
    }
    assert spec.source == {"revision": "main"}


def test_flags_of_the_engine(tmp_path: Path) -> None:
    flags = ("--kv-bits", "8", "--kv-group-size", "32", "--context-shift", "--draft-model", "small")
    cache = ("--prefix-cache", str(tmp_path), "--prefix-cache-size", "2")
    _, [spec] = read("-m", "demo", *flags, *cache, "--draft-tokens", "3")
    assert spec.draft_model == "small"
    assert spec.limits == {
        "kv_bits": 8,
        "kv_group_size": 32,
        "context_shift": True,
        "prefix_cache_dir": tmp_path,
        "prefix_cache_dir_bytes": 2_000_000_000,
        "speculation": "on",
        "max_draft_tokens": 3,
    }
    text = 'kv-bits = 8\nno-speculation = true\n[models.a]\nmodel = "demo"\nkv-bits = 4\n[models.b]\nmodel = "demo"\n'
    _, [first, second] = read("--config", config(tmp_path, text))
    assert (first.limits["kv_bits"], second.limits["kv_bits"]) == (4, 8)
    assert {spec.limits["speculation"] for spec in (first, second)} == {"off"}
    with pytest.raises(UsageError, match="leave one of them out"):
        read("-m", "demo", "--draft-model", "small", "--no-speculation")
    with pytest.raises(UsageError, match="--prefix-cache-size limits a folder"):
        read("-m", "demo", "--prefix-cache-size", "2")
    with pytest.raises(UsageError, match="--draft-model is of one model"):
        read("-m", "demo", "-m", "b=demo", "--draft-model", "small")


def test_several_models(tmp_path: Path) -> None:
    folder = tmp_path / "My Model"
    folder.mkdir()
    _, specs = read("-m", "small=demo", "-m", "org/large", "-m", str(folder), "--isq", "8")
    # A folder's path is nobody's business.
    assert [(spec.name, spec.model) for spec in specs] == [
        ("small", "demo"),
        ("org/large", "org/large"),
        ("My Model", str(folder)),
    ]
    assert {spec.options.isq for spec in specs} == {"8"}
    _, [spec] = read("-m", "demo", "--served-name", "gpt-4o", "--served-name", "other")
    assert (spec.name, spec.model, spec.aliases) == ("gpt-4o", "demo", ("other",))


def test_the_key_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(serve.API_KEY_VARIABLE, "secret")
    assert read("-m", "demo")[0].api_key == "secret"
    assert read("-m", "demo", "--api-key", "other")[0].api_key == "other"
    assert read("-m", "demo", "--config", config(tmp_path, 'api-key = "file"'))[0].api_key == "file"
    monkeypatch.setenv(serve.API_KEY_VARIABLE, "")
    assert read("-m", "demo")[0].api_key is None


FILE = """
port = 8080
host = "0.0.0.0"
cors_origin = ["https://a.example", "https://b.example"]
idle-unload = 2.5
log-json = true
enable-search = false
ui = false
isq = 4

[models.small]
model = "demo"

[models.large]
model = "org/large"
isq = "8"
revision = "v1"
served-name = ["gpt"]
"""


def test_a_file(tmp_path: Path) -> None:
    settings, specs = read("--config", config(tmp_path, FILE))
    assert (settings.port, settings.host, settings.idle_unload_s) == (8080, "0.0.0.0", 2.5)
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert (settings.log_json, settings.enable_search, settings.ui) == (True, False, False)
    small, large = specs
    assert (small.name, small.model, small.options.isq, small.source) == ("small", "demo", "4", {})
    assert (large.name, large.aliases, large.options.isq, large.source) == ("large", ("gpt",), "8", {"revision": "v1"})


@pytest.mark.parametrize("first", [True, False])
def test_the_command_line_wins(tmp_path: Path, first: bool) -> None:
    path = config(tmp_path, FILE)
    own = ["--port", "1234", "--cors-origin", "https://c.example", "--ui", "-m", "other"]
    settings, [spec] = read(*(["--config", path, *own] if first else [*own, "--config", path]))
    assert (settings.port, settings.cors_origins, settings.ui) == (1234, ("https://c.example",), True)
    assert settings.host == "0.0.0.0"
    assert (spec.name, spec.options.isq) == ("other", "4")


def test_a_model_has_its_own_also_where_that_is_the_default(tmp_path: Path) -> None:
    text = """
    no-speculation = true
    context-shift = true
    kv-group-size = 32
    dtype = "bfloat16"
    served-name = ["one"]
    [models.a]
    model = "demo"
    no-speculation = false
    context_shift = false
    kv-group-size = 64
    dtype = "auto"
    [models.b]
    model = "demo"
    """
    _, specs = read("--config", config(tmp_path, text))
    assert [spec.options.dtype for spec in specs] == ["auto", "bfloat16"]
    shifts = {"kv_group_size": 32, "context_shift": True, "speculation": "off"}
    assert [spec.limits for spec in specs] == [{"kv_group_size": 64, "context_shift": False}, shifts]


def test_the_command_line_wins_also_with_a_default(tmp_path: Path) -> None:
    _, [spec] = read("-m", "demo", "--kv-group-size", "64", "--config", config(tmp_path, "kv-group-size = 32"))
    assert spec.limits["kv_group_size"] == 64


def test_one_model_in_a_file(tmp_path: Path) -> None:
    _, specs = read("--config", config(tmp_path, 'model = ["demo", "b=org/b"]\nserved_name = "x"'))
    assert [(spec.name, spec.model) for spec in specs] == [("x", "demo"), ("b", "org/b")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", "there is no flag --prot"),
        ("kind = 'vision'", "there is no flag --kind"),
        ("config = 'x'", "there is no flag --config"),
        ("execute = 1", "there is no flag --execute"),
        ("[models.a]\nmodel = 'demo'\nport = 1", "[models.a]: there is no flag --port"),
        ("[models.a]\nisq = 4", "[models.a] needs one `model`"),
        ("[models.a]\nmodel = ['x', 'y']", "[models.a] needs one `model`"),
        ("[models.a]\nmodel = []", "[models.a] needs one `model`"),
        ("model = 'demo'\n[models.a]\nmodel = 'demo'", "has both"),
        ("models = 3", "models are tables"),
        ("port = 1979-05-27", "port can't be a date"),
        ("[port]\na = 1", "port can't be a dict"),
        ("port = ", "Invalid value"),
        ("model = 'demo'\nimage-root = '/no/such'", "--image-root /no/such is no folder"),
        ("model = 'demo'\ncors-origin = 'x'", "--cors-origin takes"),
        ("model = 'demo'\nmax-memory = -1", "--max-memory"),
    ],
)
def test_files_that_are_wrong(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(UsageError) as caught:
        read("--config", config(tmp_path, text))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "the following arguments are required: -m/--model"),
        (["-m", "demo", "--port", "x"], "--port"),
        (["-m", "demo", "--max-rows", "0"], "--max-rows"),
    ],
)
def test_flags_that_are_wrong(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(*argv)
    assert caught.value.code == 2
    assert words in capsys.readouterr().err


def test_a_mistyped_flag_is_told_of_before_its_value(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "-m", "demo", "--hots", "0.0.0.0"])
    errors = capsys.readouterr().err
    assert "unrecognized arguments: --hots (mlxvlm serve --help lists the flags)" in errors
    assert len(errors.splitlines()) == 2
    assert main(["serve", "wrong", "-m", "demo"]) == 2
    assert "'wrong' belongs to no flag, and is no kind of model" in capsys.readouterr().err


def test_flags_of_one_model_and_several_models() -> None:
    with pytest.raises(UsageError, match="--mmproj is of one model"):
        read("-m", "a", "-m", "b", "--mmproj", "x.gguf")
    with pytest.raises(UsageError, match="up to 65535"):
        read("-m", "a", "--port", "70000")
    with pytest.raises(UsageError, match="no/such"):
        read("--config", "/no/such.toml")


@contextmanager
def process(*argv: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.server.stub_app", "serve", "-p", "0", *argv]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        try:
            yield running
        finally:
            running.kill()


def url_of(running: subprocess.Popen[str]) -> str:
    assert running.stdout is not None
    line = running.stdout.readline()
    assert line.startswith("mlxvlm: demo at http://127.0.0.1:"), line
    return line.split()[-1].removesuffix("/v1")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_from_start_to_end(number: signal.Signals) -> None:
    with process("-m", "demo", "--drain", "20") as running:
        url = url_of(running)
        assert httpx2.get(f"{url}/health", trust_env=False).status_code == 200
        with httpx2.stream("GET", f"{url}/slow?tenths=4", trust_env=False) as response:
            pieces = response.iter_bytes()
            text = next(pieces)
            running.send_signal(number)
            assert text + b"".join(pieces) == b"....done"
        _, log = running.communicate(timeout=30)
        assert running.returncode == 0, log
    assert "demo is loaded after" in log
    assert f"a page to chat in is at {url}/\n" in log
    assert "path=/slow status=200" in log
    assert "Traceback" not in log
    assert "warning" not in log


def is_closed(url: str) -> bool:
    try:
        httpx2.get(f"{url}/health", trust_env=False)
    except httpx2.ConnectError:
        return True
    return False


def test_a_second_signal_ends_it_at_once() -> None:
    with process("-m", "demo", "--drain", "100", "--no-ui") as running:
        url = url_of(running)
        with httpx2.stream("GET", f"{url}/slow?tenths=600", trust_env=False) as response:
            pieces = response.iter_bytes()  # kept: a client that drops it leaves
            next(pieces)
            running.send_signal(signal.SIGINT)
            assert eventually(lambda: is_closed(url))  # it has seen the first, or the second would be the same one
            assert running.poll() is None
            running.send_signal(signal.SIGINT)
            _, log = running.communicate(timeout=60)
        assert running.returncode == 130
        assert "page" not in log


def failed(*argv: str) -> tuple[int, list[str]]:
    with process(*argv) as running:
        out, log = running.communicate(timeout=60)
        assert out == ""
        return running.returncode, log.splitlines()


def test_a_model_that_is_not_there() -> None:
    code, lines = failed("-m", "/no/such/model", "--log-json")
    assert code == 4
    assert lines[-1].startswith("mlxvlm: error: ")
    assert not any("Traceback" in line for line in lines)


def test_a_port_that_is_taken() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        code, lines = failed("-m", "demo", "-p", str(port))
    assert (code, lines) == (2, [f"mlxvlm: error: port {port} is in use: choose another with --port (0: any free one)"])


def test_a_warning_where_everybody_may_come(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_listening(settings: ServerSettings) -> Any:
        raise UsageError("enough")

    monkeypatch.setattr("mlxvlm.server.serving.listen", no_listening)
    monkeypatch.setattr("mlxvlm.server.request_log.configure_logging", lambda as_json: None)
    for argv, warns in [
        (["--host", "0.0.0.0"], True),
        (["--host", "0.0.0.0", "--api-key", "k"], False),
        ([], False),
    ]:
        with pytest.raises(UsageError, match="enough"):
            serve.execute(parser().parse_args(["serve", "-m", "demo", *argv]))
        assert ("there is no API key" in capsys.readouterr().err) is warns
