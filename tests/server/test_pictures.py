"""What an image_url may be: URLs, data: URLs, base64, and files within bounds."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from mlxvlm.errors import ImageError
from mlxvlm.processors.images import decode_image
from mlxvlm.processors.sources import DEFAULT_LIMITS
from mlxvlm.server import local_files
from mlxvlm.server.pictures import Pictures, RecentBytes
from mlxvlm.server.settings import ServerSettings
from tests.processors.conftest import Web
from tests.processors.pictures import encode

PNG = encode(Image.new("RGB", (3, 2), "red"), "PNG")
TEXT = base64.b64encode(PNG).decode()
LOCAL, OPEN = ServerSettings(), ServerSettings(host="0.0.0.0")
LIMITS = replace(DEFAULT_LIMITS, max_bytes=10_000)


def read(source: str, policy: ServerSettings = OPEN) -> bytes:
    async def once() -> bytes:
        pictures = Pictures(policy, LIMITS)
        try:
            return await pictures.read(source)
        finally:
            pictures.close()

    return asyncio.run(once())


def refusal(source: str, policy: ServerSettings = OPEN) -> str:
    with pytest.raises(ImageError) as caught:
        read(source, policy)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of pictures, a file beside it, and links of all kinds."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for path in (folder / "a.png", folder / "deep/b.png", folder / "two words.png", tmp_path / "secret.png"):
        path.write_bytes(PNG)
    (folder / "inner.png").symlink_to("deep/b.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "up.png").symlink_to("../secret.png")
    (folder / "out").symlink_to(tmp_path)
    (folder / "chain.png").symlink_to("up.png")
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "broken.png").symlink_to("nothing.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def test_data_urls_and_base64() -> None:
    for source in (
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/png;base64,{TEXT}",
        TEXT,
        f" {TEXT[:10]}\n{TEXT[10:]}",
    ):
        assert read(source) == PNG
    # The content decides what it is, not the type.
    for lie in ("image/jpeg", "text/html", "application/x-msdownload", ""):
        assert read(f"data:{lie};base64,{TEXT}") == PNG


@pytest.mark.parametrize(
    "source", ["data:image/png;base64,AAAA", "data:text/html,<script>", "data:image/svg+xml,<svg/>"]
)
def test_what_is_no_picture_is_refused_where_it_is_decoded(source: str) -> None:
    with pytest.raises(ImageError, match="not an image"):
        decode_image(read(source), "the image data")


@pytest.mark.parametrize(
    "source",
    [
        *(
            "",
            "  ",
            "data:",
            "data:image/png;base64,",
            "data:image/png;base64,?",
            "data:image/png;base64",
            "not base64!",
        ),
        *("A" * 30_000, "data:image/png;base64," + "A" * 30_000, "?" * 300),
        *("ftp://a.example/b.png", "gopher://a.example", "s3://a/b", "file://host/a.png", "javascript:alert(1)"),
    ],
)
@pytest.mark.parametrize("policy", [OPEN, LOCAL], ids=["open", "local"])
def test_what_is_not_taken(source: str, policy: ServerSettings) -> None:
    assert len(refusal(source, policy)) < 400


def test_files_of_a_server_for_this_machine(root: Path) -> None:
    for source in (f"{root}/a.png", f"file://{root}/a.png", f"file://localhost{root}/a.png", f"file:{root}/a.png"):
        assert read(source, LOCAL) == PNG
    assert read(f"file://{root}/two%20words.png", LOCAL) == PNG
    assert read(f"{root}/link.png", LOCAL) == PNG  # the user's own links
    for wrong in (
        root,
        root / "pipe.png",
        root / "none.png",
        root / "loop.png",
        "/dev/zero",
        "a\0b",
        "~nobody-there/a",
    ):
        refusal(str(wrong), LOCAL)
    (root / "large.png").write_bytes(bytes(10_001))
    assert "larger than the limit" in refusal(f"{root}/large.png", LOCAL)


def test_base64_that_is_as_short_as_a_path() -> None:
    assert len(TEXT) < 255
    assert read(TEXT, LOCAL) == PNG
    assert "no such image file: photos/cats" in refusal("photos/cats", LOCAL)


def test_no_files_of_an_open_server(root: Path) -> None:
    there, missing = refusal(f"{root}/a.png"), refusal(f"{root}/b.png")
    assert "--image-root" in there
    assert there.replace("a.png", "b.png") == missing
    assert "--image-root" in refusal(f"file://{root}/a.png")


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_files_under_the_root(root: Path, host: str) -> None:
    policy = ServerSettings(host=host, image_root=root)
    for source in ("a.png", "deep/b.png", "deep/../a.png", f"{root}/a.png", f"file://{root}/deep/b.png", "inner.png"):
        assert read(source, policy) == PNG


@pytest.mark.parametrize(
    "source",
    [
        *(
            "../secret.png",
            "deep/../../secret.png",
            "link.png",
            "up.png",
            "chain.png",
            "out/secret.png",
            "out/pictures/../secret.png",
        ),
        *(
            "/etc/passwd",
            "file:///etc/passwd",
            "file:///etc%2Fpasswd",
            "loop.png",
            "broken.png",
            "none.png",
            "deep",
            ".",
            "",
        ),
        *("pipe.png", "a.png/x", "a.png\0", "~/a.png", "/dev/zero", "./..", "....//secret.png", "deep/" + "x" * 260),
        *("%2e%2e/secret.png", "file:..%2fsecret.png", "file:///../secret.png"),
    ],
)
def test_no_file_outside_of_the_root(root: Path, source: str) -> None:
    policy = ServerSettings(host="127.0.0.1", image_root=root)
    message = refusal(source, policy)
    if source and len(source) < 100:
        # The same for what is missing, what is forbidden, and what is no file.
        assert message.startswith("no such image under the server's image folder: ")
        assert str(root.parent) not in message.replace(source, "")


PARTS = st.sampled_from(
    ["..", ".", "deep", "out", "a.png", "secret.png", "link.png", "up.png", "pictures", "", "~", "inner.png"]
)


@given(parts=st.lists(PARTS, min_size=1, max_size=6), absolute=st.booleans(), as_url=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_walks(root: Path, parts: list[str], absolute: bool, as_url: bool) -> None:
    """What is read lies under the root, however the path wanders: the secret has other bytes."""
    (root.parent / "secret.png").write_bytes(b"secret")
    source = "/".join(parts)
    source = f"{root}/{source}" if absolute else source
    try:
        data = read(f"file://{source}" if as_url and absolute else source, ServerSettings(image_root=root))
    except ImageError:
        return
    assert data == PNG


def test_a_folder_that_becomes_a_link_after_it_was_resolved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root.parent / "b.png").write_bytes(b"secret")
    genuine = local_files._open_without_links

    def swap(folder: Path, inside: Path) -> int:
        (root / "deep").rename(root / "was")
        (root / "deep").symlink_to(root.parent)
        return genuine(folder, inside)

    monkeypatch.setattr(local_files, "_open_without_links", swap)
    assert "no such image" in refusal("deep/b.png", ServerSettings(image_root=root))


def test_a_file_that_becomes_a_link_after_it_was_resolved(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = local_files._open_without_links

    def swap(folder: Path, inside: Path) -> int:
        (root / "a.png").unlink()
        (root / "a.png").symlink_to(root.parent / "secret.png")
        return genuine(folder, inside)

    monkeypatch.setattr(local_files, "_open_without_links", swap)
    assert "no such image" in refusal("a.png", ServerSettings(image_root=root))


def test_no_descriptor_is_left(root: Path) -> None:
    before = len(os.listdir("/dev/fd"))
    assert local_files.read_under(root, Path("deep/b.png"), LIMITS) == PNG
    for source in ("deep/none.png", "link.png", "pipe.png", "deep", "a.png/x"):
        with pytest.raises(ImageError):
            local_files.read_under(root, Path(source), LIMITS)
    assert len(os.listdir("/dev/fd")) == before


def test_urls_are_fetched_once(web: Web) -> None:
    policy = replace(OPEN, allow_private_urls=True)
    url = web.add("/a.png", PNG)

    async def twice() -> Sequence[bytes]:
        pictures = Pictures(policy, LIMITS)
        first = await pictures.read(url)
        missing = await asyncio.gather(pictures.read(f"{web.url}/b.png"), return_exceptions=True)
        assert isinstance(missing[0], ImageError)
        second = await pictures.read(url)
        pictures.close()
        return first, second

    assert asyncio.run(twice()) == (PNG, PNG)
    assert web.asked == ["/a.png", "/b.png"]


def test_private_urls() -> None:
    assert "no public address" in refusal("http://127.0.0.1/a.png", LOCAL)


def test_recent_bytes() -> None:
    now = 0.0
    recent = RecentBytes(max_bytes=10, keep_s=5, clock=lambda: now)
    recent.put("a", b"aaaa")
    recent.put("b", b"bbbb")
    assert recent.get("a") == b"aaaa"
    recent.put("c", b"cccc")  # b is the one that was not used
    assert [recent.get(name) for name in "abc"] == [b"aaaa", None, b"cccc"]
    recent.put("a", b"new")
    assert (recent.get("a"), recent.nbytes) == (b"new", 7)
    now = 5.0
    assert recent.get("a") is None
    recent.put("huge", bytes(11))
    assert (recent.get("huge"), recent.nbytes) == (None, 0)
