"""Ranks that don't come, die, stop or fail, as processes: every request and every process ends with the reason."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.ranks.processes import Process, ranks

RUN = ("run", "-m", "demo", "What is this?")
SERVE = ("serve", "-m", "demo", "--port", "0")
STOPS = ("--rank-timeout", "2")
STALLS = ("--rank-stall-timeout", "2")
LOST = "rank 1 of 2 (127.0.0.1) was lost: the connection was closed"
SILENT = "rank 1 of 2 (127.0.0.1) was lost: nothing was heard of it for 2 s"
STALLED = "rank 0 of 2 (127.0.0.1) failed: a step took longer than 2 s, so some rank's part of it did not come"


def client_of(server: Process) -> openai.OpenAI:
    url = server.wait_for(r"mlxvlm: demo at (\S+)")[1]
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


class Asked(threading.Thread):
    """A request under way; `error` is how it ends."""

    def __init__(self, client: openai.OpenAI, streams: bool) -> None:
        super().__init__()
        self.client, self.streams = client, streams
        self.has_begun, self.error = threading.Event(), None
        self.start()

    def run(self) -> None:
        asked: dict[str, Any] = {"model": "default", "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        messages: Any = [{"role": "user", "content": "Tell me a story."}]
        try:
            if not self.streams:
                self.client.chat.completions.create(messages=messages, **asked)
                return
            for chunk in self.client.chat.completions.create(messages=messages, stream=True, **asked):
                if chunk.choices and chunk.choices[0].delta.content:
                    self.has_begun.set()
        except openai.OpenAIError as error:
            self.error = error
        finally:
            self.has_begun.set()

    def check(self, text: str) -> None:
        """It has ended with that error."""
        self.join(120)
        assert isinstance(self.error, openai.APIError)
        assert text in str(self.error)
        if not self.streams:
            assert isinstance(self.error, openai.InternalServerError)
            assert self.error.status_code == 503


@contextmanager
def asking(
    folder: Path, faults: dict[int, str] | None = None, flags: Sequence[str] = ()
) -> Iterator[tuple[list[Process], list[Asked]]]:
    """A server of two ranks with requests under way."""
    with ranks(folder, 2, [*SERVE, *flags], faults) as started, client_of(started[0]) as client:
        yield started, [Asked(client, True), Asked(client, False)]


def check_end(started: list[Process], text: str, *others: str) -> None:
    """All have ended with status 1 and one line of the reason; others: further ones that may be given."""
    for each in started:
        assert each.status() == 1, each.said
        assert len(each.errors) == 1, each.said
        assert any(words in each.errors[0] for words in (text, *others)), each.said


def test_a_rank_that_does_not_come(tmp_path: Path) -> None:
    words = ("run", "-m", "demo", "--rank-start-timeout", "2", "hello")
    with ranks(tmp_path, 2, words, present=(0,)) as started:
        check_end(started, "rank 1 of 2 (127.0.0.1) did not come within 2 s")


def test_another_file_of_hosts(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, RUN, present=(0,)) as [first]:
        own = tmp_path / "own.json"
        own.write_text((tmp_path / "hosts.json").read_text().replace("]]", '], ["127.0.0.1:9"]]'))
        other = Process(["-m", "mlxvlm", *RUN], tmp_path / "other.txt", MLX_RANK="1", MLX_HOSTFILE=str(own))
        try:
            check_end([first, other], "has the number of ranks 3, ")
        finally:
            other.end()


def test_a_file_of_hosts_that_is_none(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.json"
    hosts.write_text('[{"ssh": "mac1", "ips": ["10.0.0.1"]}, {"ssh": "mac2", "ips": ["10.0.0.2"]}]')
    process = Process(["-m", "mlxvlm", *RUN], tmp_path / "log.txt", MLX_RANK="0", MLX_HOSTFILE=str(hosts))
    assert process.status() == 2
    assert "let mlx.launch make this one" in process.errors[0]


def test_ranks_that_mlx_does_not_connect(tmp_path: Path) -> None:
    words = ("run", "-m", "demo", "--rank-start-timeout", "5", "hello")
    with ranks(tmp_path, 2, words, {1: "no-connection"}) as started:
        check_end(started, "MLX's ring did not connect it with rank ")


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("fault", ["load", "prefill"])
def test_a_rank_that_is_killed(tmp_path: Path, victim: int, fault: str) -> None:
    name = "leaders-prefill" if (victim, fault) == (0, "prefill") else fault
    with ranks(tmp_path, 2, RUN, {victim: name}) as started:
        started[victim].wait_for(f"AT {name}")
        started[victim].popen.kill()
        check_end([started[1 - victim]], f"rank {victim} of 2 (127.0.0.1) was lost: the connection was closed")


def test_a_rank_that_is_killed_while_requests_run(tmp_path: Path) -> None:
    with asking(tmp_path) as (started, requests):
        requests[0].has_begun.wait(120)
        started[1].popen.kill()
        for each in requests:
            each.check(LOST)
        check_end(started[:1], LOST)


def test_rank_0_that_is_killed_while_requests_run(tmp_path: Path) -> None:
    with asking(tmp_path) as (started, requests):
        requests[0].has_begun.wait(120)
        started[0].popen.kill()
        check_end(started[1:], "rank 0 of 2 (127.0.0.1) was lost: the connection was closed")
        for each in requests:
            each.join(120)
            assert isinstance(each.error, openai.APIConnectionError)


def test_a_rank_that_is_stopped_for_a_while(tmp_path: Path) -> None:
    with asking(tmp_path, flags=STOPS) as (started, requests):
        requests[0].has_begun.wait(120)
        os.kill(started[1].popen.pid, signal.SIGSTOP)
        for each in requests:
            each.check(SILENT)
        check_end(started[:1], SILENT)
        os.kill(started[1].popen.pid, signal.SIGCONT)
        check_end(started[1:], SILENT, "rank 0 of 2 (127.0.0.1) was lost: ")


def test_rank_0_that_is_stopped_for_a_while(tmp_path: Path) -> None:
    with asking(tmp_path, flags=STOPS) as (started, requests):
        requests[0].has_begun.wait(120)
        os.kill(started[0].popen.pid, signal.SIGSTOP)
        check_end(started[1:], "rank 0 of 2 (127.0.0.1) was lost: nothing was heard of it for 2 s")
        os.kill(started[0].popen.pid, signal.SIGCONT)
        for each in requests:
            each.check("rank 1 of 2 (127.0.0.1) was lost: ")
        check_end(started[:1], "rank 1 of 2 (127.0.0.1) was lost: ")


@pytest.mark.parametrize("fault", ["bad-load", "bad-prefill"])
def test_a_rank_that_fails_says_why(tmp_path: Path, fault: str) -> None:
    with ranks(tmp_path, 2, RUN, {1: fault}) as started:
        check_end(started[:1], "rank 1 of 2 (127.0.0.1) failed: OSError: the disk is full")
        check_end(
            started[1:], "rank 1 of 2 (127.0.0.1): OSError: the disk is full", "failed: OSError: the disk is full"
        )


def test_a_rank_that_fails_while_requests_run(tmp_path: Path) -> None:
    with asking(tmp_path, {1: "bad-decode"}) as (_, requests):
        for each in requests:
            each.check("rank 1 of 2 (127.0.0.1) failed: OSError: the disk is full")


def test_a_rank_that_is_alive_and_does_not_do_its_part(tmp_path: Path) -> None:
    with asking(tmp_path, {1: "decode"}, STALLS) as (started, requests):
        for each in requests:
            each.check(STALLED)
        check_end(started, STALLED)


def test_rank_0_that_fails_to_load_says_why(tmp_path: Path) -> None:
    with ranks(tmp_path, 2, RUN, {0: "bad-load"}) as started:
        assert started[0].status() == 5
        assert started[0].errors == ["mlxvlm: error: OSError: the disk is full"]
        check_end(started[1:], "rank 0 of 2 (127.0.0.1) failed: the disk is full")
