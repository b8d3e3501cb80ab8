"""Which of a checkpoint's small files is read, and what happens when one is damaged."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from mlxvlm.errors import ModelError, ModelNotFoundError
from mlxvlm.processors.files import ProcessorFiles, read_json
from tests.processors.checkpoints import CONFIG, IMAGE_SETTINGS, write_checkpoint

# In the order of precedence.
PLACES = ("processor_config.json", "chat_template.json", "chat_template.jinja", "tokenizer_config.json")


def read(tmp_path: Path, files: dict[str, Any], chat_template: Path | None = None) -> ProcessorFiles:
    folder = write_checkpoint(tmp_path / "model", files=files)
    return ProcessorFiles.read(folder, CONFIG, chat_template)


def templates_at(places: tuple[str, ...], template: Any = None) -> dict[str, Any]:
    """Each place holds its own name as its template."""
    files: dict[str, Any] = {"chat_template.jinja": None}
    for place in places:
        content = template or place
        files[place] = content if place.endswith(".jinja") else {"chat_template": content}
    return files


SETS = [places for count in range(5) for places in itertools.combinations(PLACES, count)]


@pytest.mark.parametrize("places", SETS, ids=lambda places: "+".join(places) or "none")
def test_precedence(tmp_path: Path, places: tuple[str, ...]) -> None:
    files = read(tmp_path, templates_at(places))
    assert files.template_source == (places[0] if places else None)
    assert files.template("default").render([]) == (places[0] if places else "default")
    given = tmp_path / "given.jinja"
    given.write_text("given")
    assert read(tmp_path, templates_at(places), given).template("default").render([]) == "given"


def test_no_template(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template; give one with --chat-template FILE"):
        read(tmp_path, templates_at(())).template()


NAMED: dict[str, Any] = {
    "list": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
    "mapping": {"tool_use": "T", "default": "D"},
}


@pytest.mark.parametrize("template", NAMED.values(), ids=NAMED.keys())
@pytest.mark.parametrize("place", [place for place in PLACES if place.endswith(".json")])
def test_named_templates(tmp_path: Path, place: str, template: Any) -> None:
    assert read(tmp_path, templates_at((place,), template)).template_source == "D"


@pytest.mark.parametrize("template", ["", [], {}, [{"name": "rag", "template": "R"}], [{"name": "default"}], 7, ["x"]])
def test_places_without_a_default_are_passed_over(tmp_path: Path, template: Any) -> None:
    files = templates_at(PLACES[1:])
    files["processor_config.json"] = {"chat_template": template}
    assert read(tmp_path, files).template_source == "chat_template.json"


def test_templates_know_the_special_tokens(tmp_path: Path) -> None:
    files = {"chat_template.jinja": "{{ bos_token }}{{ eos_token }}", "special_tokens_map.json": {"bos_token": "<m>"}}
    assert read(tmp_path, files).template().render([]) == "<s></s>"
    files["tokenizer_config.json"] = {"eos_token": {"content": "</s>"}}
    assert read(tmp_path, files).template().render([]) == "<m></s>"


@pytest.mark.parametrize("name", ["t.jinja", "t.txt", "t"])
def test_given_template_as_text(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("é{{ 1 }}", encoding="utf-8")
    assert read(tmp_path, {}, tmp_path / name).template().render([]) == "é1"


@pytest.mark.parametrize("content", ["D", *NAMED.values()])
def test_given_template_as_json(tmp_path: Path, content: Any) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps({"chat_template": content}))
    assert read(tmp_path, {}, file).template_source == "D"


def test_given_template_is_missing(tmp_path: Path) -> None:
    for path in (tmp_path / "no.jinja", tmp_path / "no.json", tmp_path):
        with pytest.raises(ModelNotFoundError) as caught:
            read(tmp_path, {}, path)
        assert str(caught.value) == f"no such chat template file: {path}"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.jinja", b"\xff\xfe\0\x01", "can't be read as text"),
        ("t.json", b"\xff\xfe\0\x01", "is not readable as JSON"),
        ("t.json", b"{{ messages }}", "is not readable as JSON"),
        ("t.json", b'["a"]', "holds no JSON object"),
        ("t.json", b'{"template": "a"}', "has no 'chat_template'"),
        ("t.json", b'{"chat_template": [{"name": "rag", "template": "R"}]}', "has no 'chat_template'"),
    ],
)
def test_given_template_is_damaged(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(ModelError) as caught:
        read(tmp_path, {}, file)
    assert str(caught.value).startswith(f"{file} {words}")
    assert len(str(caught.value).splitlines()) == 1


def test_given_template_with_a_syntax_error(tmp_path: Path) -> None:
    file = tmp_path / "t.jinja"
    file.write_text("{% if %}")
    with pytest.raises(ModelError, match="syntax error"):
        read(tmp_path, {}, file).template()


def test_image_processor_inside_or_beside(tmp_path: Path) -> None:
    inside, beside = {"size": {"longest_edge": 1}}, {"size": {"longest_edge": 2}}
    both = {"processor_config.json": {"image_processor": inside}, "preprocessor_config.json": beside}
    assert read(tmp_path / "a", both).image_processor == inside
    assert read(tmp_path / "b", {"preprocessor_config.json": beside}).image_processor == beside
    neither = {"processor_config.json": None, "preprocessor_config.json": None}
    assert read(tmp_path / "c", neither).image_processor == {}
    assert read(tmp_path / "d", {}).image_processor == IMAGE_SETTINGS


def test_all_that_is_read(tmp_path: Path) -> None:
    files = read(tmp_path, {})
    assert files.config == CONFIG
    assert files.processor == {"image_seq_len": 4}
    assert files.tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


JSON_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
)


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{broken", "is not readable as JSON: "),
        ("", "is not readable as JSON: "),
        ("[1]", "holds no JSON object"),
        ('"text"', "holds no JSON object"),
        ("null", "holds no JSON object"),
    ],
)
def test_broken_json(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(ModelError) as caught:
        read(tmp_path, {name: content})
    assert str(caught.value).startswith(f"{tmp_path / 'model' / name} {words}")
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("name", [*JSON_FILES, "chat_template.jinja"])
def test_file_that_is_not_utf8(tmp_path: Path, name: str) -> None:
    folder = write_checkpoint(tmp_path / "model")
    (folder / name).write_bytes(b'{"chat_template": "\xff"}')
    with pytest.raises(ModelError) as caught:
        ProcessorFiles.read(folder, CONFIG)
    assert str(folder / name) in str(caught.value)


def test_missing_tokenizer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"tokenizer\.json is missing in "):
        ProcessorFiles.read(folder, CONFIG)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    file = folder / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError) as caught:
        ProcessorFiles.read(folder, CONFIG)
    assert str(caught.value).startswith(f"{file} can't be read: ")


def test_read_json(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    assert read_json(file) == {}
    file.write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(file) == {"é": [1, None]}
