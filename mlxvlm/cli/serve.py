"""`mlxvlm serve`: models behind HTTP. Knows flags and files of flags, not endpoints.

A flag is looked for on the command line, then in --config FILE, then it has its default.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxvlm.cli.engine_options import add_engine_options, engine_options, max_memory_bytes
from mlxvlm.cli.options import REQUANTIZE, add_model_options, add_quantisation_options, load_options
from mlxvlm.cli.ranks_options import add_ranks_options, membership
from mlxvlm.cli.tool_options import add_tool_options, mcp_tools
from mlxvlm.errors import UsageError

if TYPE_CHECKING:
    from mlxvlm.agent.loop import BoundTool
    from mlxvlm.ranks.place import Member
    from mlxvlm.server.registry import ModelSpec
    from mlxvlm.server.settings import ServerSettings

API_KEY_VARIABLE = "MLXVLM_API_KEY"  # a secret: other users of a machine can read command lines
# mistral.rs has these words before the model; here the checkpoint says what it is.
_KINDS = ("auto", "run", "text", "plain", "vision", "vision-plain", "multimodal")
_NOT_IN_FILES = ("kind", "config", "shard_of")
# Of one model: in [models.NAME] too, and beside one -m only where they name a file of it.
_SOURCE = ("arch", "mmproj", "from_uqff", "revision", "chat_template")
_ONE_MODEL = (*_SOURCE, "draft_model")
_ENGINE = ("kv_bits", "kv_group_size", "context_shift", "prefix_cache", "prefix_cache_size", "no_speculation")
_MODEL_DEFAULTS = {"dtype": "auto", "requantize": REQUANTIZE}
_OF_MODELS = (
    *("model", "served_name", "dtype", "max_memory", "requantize", "isq", "isq_vision", "topology", "isq_cache"),
    *("no_isq_cache", "max_rows", "max_queue", "max_images", "request_timeout", "draft_tokens"),
    *_ENGINE,
    *_ONE_MODEL,
)
# Field of ServerSettings -> flag.
_SETTINGS = {
    **{name: name for name in ("host", "port", "api_key", "allow_private_urls", "image_root", "max_connections")},
    **{name: name for name in ("log_json", "ui", "enable_search", "search_url", "mcp_config", "max_tool_rounds")},
    "idle_unload_s": "idle_unload",
    "drain_s": "drain",
}
_EPILOG = """\
examples:
  mlxvlm serve -m HuggingFaceTB/SmolVLM-256M-Instruct
  mlxvlm serve -m small=HuggingFaceTB/SmolVLM-256M-Instruct -m large=Qwen/Qwen2-VL-7B-Instruct --isq 4
  mlxvlm serve --config server.toml --port 8080

A file for --config has the long flags' names as keys, and a table for each model with flags of its own:
  port = 8080
  idle-unload = 600
  [models.large]
  model = "Qwen/Qwen2-VL-7B-Instruct"
  isq = 4
"""


def add_parser(commands: Any) -> None:
    """Adds `serve` to the commands."""
    parser = commands.add_parser(
        "serve",
        help="answer programs over HTTP, as OpenAI's API does",
        description="Answer programs over HTTP, as OpenAI's API does; only this machine can connect without --host.",
        usage="%(prog)s [options] -m [NAME=]MODEL",  # all of them would fill a screen before each error
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("kind", nargs="?", metavar="KIND", help="ignored: " + ", ".join(_KINDS))
    parser.add_argument("--config", type=Path, metavar="FILE", help="a TOML file with these flags (see below)")
    add_model_options(parser, many=True)
    add_quantisation_options(parser)
    add_engine_options(parser)
    _add_network_options(parser)
    _add_picture_options(parser)
    _add_limits(parser)
    parser.add_argument("--log-json", action="store_true", help="one JSON object for each line of the log")
    parser.add_argument(
        "--ui", action=argparse.BooleanOptionalAction, help="the page for browsers (default: for this machine only)"
    )
    add_tool_options(parser)
    add_ranks_options(parser)
    # None and False stand for what is not given: the defaults come after the file.
    parser.set_defaults(kv_group_size=None)
    parser.set_defaults(unset=vars(parser.parse_args([])), parser=parser, execute=execute)


def _add_network_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("who may connect (docs/server-security.md)")
    group.add_argument("-p", "--port", type=int, metavar="N", help="default: 1234; 0: any free one")
    group.add_argument("--host", help="address to listen on (default: 127.0.0.1, for this machine only)")
    group.add_argument(
        "--api-key", metavar="KEY", help=f"what clients must send; better in the variable {API_KEY_VARIABLE}"
    )
    group.add_argument(
        "--served-name", action="append", metavar="NAME", help="the first model's name; repeated: other names of it"
    )
    group.add_argument("--allowed-host", action="append", metavar="NAME", help="a further name of this server")
    group.add_argument(
        "--cors-origin", action="append", metavar="URL", help="let this origin's web pages use the server; *: all"
    )


def _add_picture_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("pictures")
    group.add_argument("--allow-private-urls", action="store_true", help="fetch from this machine's network too")
    group.add_argument(
        "--image-root",
        type=Path,
        metavar="DIR",
        help="read picture files of this folder only (default: with a loopback --host any file, else none)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument("--max-rows", type=_count, metavar="N", help="requests that run together (default: 16)")
    group.add_argument("--max-queue", type=_count, metavar="N", help="requests that wait (default: 256)")
    group.add_argument("--max-images", type=_count, metavar="N", help="of one request (default: 64)")
    group.add_argument("--request-timeout", type=float, metavar="S", help="an answer ends after S seconds")
    group.add_argument("--max-body-mb", type=float, metavar="MB", help="of one request (default: 67)")
    group.add_argument("--max-connections", type=_count, metavar="N", help="at a time (default: 1000)")
    group.add_argument("--idle-unload", type=float, metavar="S", help="unload a model that nobody used for S seconds")
    group.add_argument("--drain", type=float, metavar="S", help="seconds for running requests at the end (default: 30)")


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError(text)
    return value


def execute(args: argparse.Namespace) -> int:
    """Runs the command; raises MlxvlmError."""
    if args.kind not in (None, *_KINDS):  # the parser would tell of it before the mistyped flag that it belongs to
        raise UsageError(f"{args.kind!r} belongs to no flag, and is no kind of model: -m gives the model")
    flags, tables = merged(args)
    settings, specs = settings_of(flags), specs_of(flags, tables, args.parser)
    with membership(argparse.Namespace(**flags, argv=args.argv)) as member:
        if member is not None:
            _check_shared(settings, specs, member)
        with mcp_tools(settings.mcp_config) as mcp:
            is_stuck = _run(settings, specs, mcp, member)
    if is_stuck:
        sys.stdout.flush()
        os._exit(0)  # a fetch that does not end would hold up the interpreter's end
    return 0


def _check_shared(settings: ServerSettings, specs: list[ModelSpec], member: Member) -> None:
    """Ranks after the first don't return. Raises UsageError, SystemExit."""
    from mlxvlm.server.loading import CheckpointLoader
    from mlxvlm.server.shared_model import check_shared

    check_shared(specs, settings.idle_unload_s)
    if member.follows:
        CheckpointLoader(member).load(specs[0], lambda done, total: None)


def _run(
    settings: ServerSettings, specs: list[ModelSpec], mcp: Sequence[BoundTool], member: Member | None = None
) -> bool:
    """Whether something can't be ended."""
    import asyncio

    from mlxvlm.server.assembly import assemble
    from mlxvlm.server.loading import CheckpointLoader
    from mlxvlm.server.registry import Registry
    from mlxvlm.server.request_log import configure_logging
    from mlxvlm.server.serving import allow_connections, listen, serve, url_of
    from mlxvlm.server.shared_model import SharedModel

    configure_logging(settings.log_json)
    if not settings.is_loopback and settings.api_key is None:
        print(
            f"mlxvlm: warning: everybody who can reach {settings.host} may use this server, and there is no API key: "
            f"set {API_KEY_VARIABLE}",
            file=sys.stderr,
        )
    allow_connections(settings.max_connections)
    listener = listen(settings)

    async def main() -> bool:
        kind = Registry if member is None else SharedModel
        loader = CheckpointLoader(member)
        registry = kind(specs, loader, idle_unload_s=settings.idle_unload_s, drain_s=settings.drain_s)

        def tell() -> None:
            print(f"mlxvlm: {', '.join(registry.names)} at {url_of(listener)}/v1", flush=True)
            if settings.shows_ui:
                logging.getLogger(__name__).info("a page to chat in is at %s/", url_of(listener))

        await serve(assemble(registry, settings, mcp), registry, settings, listener, tell)
        return registry.is_stuck

    return asyncio.run(main())


def merged(args: argparse.Namespace) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """All flags, and the tables of models. Raises UsageError."""
    given = {name: value for name, value in vars(args).items() if name in args.unset and value != args.unset[name]}
    file, tables = _read(given.get("config"), args.parser, args.unset)
    if "model" in given:
        tables = {}
    if given.get("api_key") is None and file.get("api_key") is None:
        file["api_key"] = os.environ.get(API_KEY_VARIABLE) or None
    return {**args.unset, **file, **given}, tables


def _read(
    path: Path | None, parser: argparse.ArgumentParser, unset: Mapping[str, Any]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Flags and [models.*] of a TOML file, read as the command line would be."""
    if path is None:
        return {}, {}
    import tomllib

    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"--config {path}: {error}") from error
    tables = found.pop("models", {})
    if not isinstance(tables, dict) or not all(isinstance(table, dict) for table in tables.values()):
        raise UsageError(f"--config {path}: models are tables: [models.NAME]")
    if tables and "model" in found:
        raise UsageError(f"--config {path} has both `model` and [models.NAME]: write all of them as tables")
    read = {name: _flags(table, parser, _OF_MODELS, f"{path}, [models.{name}]") for name, table in tables.items()}
    known = [name for name in unset if name not in _NOT_IN_FILES]
    return _flags(found, parser, known, str(path)), read


def _flags(table: Mapping[str, Any], parser: argparse.ArgumentParser, known: Any, place: str) -> dict[str, Any]:
    """Of the table's keys, also those that say what is the default: a model's own wins over what holds for all."""
    names = [key.replace("-", "_") for key in table]
    for name in names:
        if name not in known:
            raise UsageError(f"--config {place}: there is no flag --{name.replace('_', '-')} to set")
    read = parser.parse_args([word for key, value in table.items() for word in _words(key, value, place)])
    return {name: getattr(read, name) for name in names}


def _words(key: str, value: Any, place: str) -> Iterator[str]:
    """A key of TOML as the command line has it."""
    flag = f"--{key.replace('_', '-')}"
    if isinstance(value, bool):
        if value:
            yield flag
        elif flag == "--ui":
            yield "--no-ui"
    elif isinstance(value, list):
        for each in value:
            yield from _words(key, each, place)
    elif isinstance(value, str | int | float):
        yield f"{flag}={value}"
    else:
        raise UsageError(f"--config {place}: {key} can't be a {type(value).__name__}")


def settings_of(flags: Mapping[str, Any]) -> ServerSettings:
    """Of all flags. Raises UsageError."""
    from mlxvlm.server.settings import ServerSettings

    given = {field: flags[flag] for field, flag in _SETTINGS.items() if flags[flag] is not None}
    if flags["max_body_mb"] is not None:
        given["max_body_bytes"] = int(min(flags["max_body_mb"], 1e6) * 1e6)
    return ServerSettings(
        allowed_hosts=tuple(flags["allowed_host"] or ()), cors_origins=tuple(flags["cors_origin"] or ()), **given
    )


def specs_of(
    flags: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]], parser: argparse.ArgumentParser
) -> list[ModelSpec]:
    """The models in order. Raises UsageError."""
    for name, table in tables.items():
        if len(table.get("model") or ()) != 1:
            raise UsageError(f"[models.{name}] needs one `model`")
    if tables:
        return [
            _spec(name, table["model"][0], {**flags, "served_name": None, **table}) for name, table in tables.items()
        ]
    models = [_split(text) for text in flags["model"] or ()]
    if not models:
        parser.error("the following arguments are required: -m/--model (or a --config that names models)")
    own = [f"--{name.replace('_', '-')}" for name in _ONE_MODEL if flags[name] is not None]
    if len(models) > 1 and own:
        raise UsageError(f"{own[0]} is of one model: with several, write it into its [models.NAME] (--config)")
    first, *others = models
    names = flags["served_name"] or [first[0]]
    rest = [_spec(name, model, {**flags, "served_name": None}) for name, model in others]
    return [_spec(names[0], first[1], {**flags, "served_name": names[1:]}), *rest]


def _split(text: str) -> tuple[str, str]:
    """NAME=MODEL, or a model that is called what it is; a folder by its last part, for paths are nobody's business."""
    name, equals, model = text.partition("=")
    if equals and name and "/" not in name and not Path(text).exists():
        return name, model
    path = Path(text).expanduser()
    return (path.resolve().name if path.exists() else text), text


def _spec(name: str, model: str, flags: Mapping[str, Any]) -> ModelSpec:
    from mlxvlm.server.registry import ModelSpec

    args = argparse.Namespace(**{**flags, **{name: flags[name] or value for name, value in _MODEL_DEFAULTS.items()}})
    limits = {
        "max_rows": args.max_rows,
        "max_queue": args.max_queue,
        "max_images": args.max_images,
        "timeout_s": args.request_timeout,
        "max_memory_bytes": max_memory_bytes(args),
        **engine_options(args),
    }
    if args.draft_model is not None and args.no_speculation:
        raise UsageError("--draft-model guesses, --no-speculation forbids it: leave one of them out")
    return ModelSpec(
        name,
        model,
        tuple(args.served_name or ()),
        load_options(args),
        {key: flags[key] for key in _SOURCE if flags[key] is not None},
        {key: value for key, value in limits.items() if value is not None},
        args.draft_model,
    )
