"""One thread that owns MLX: it loads a model and answers requests from any thread. Knows no family and no door.

Each tick: commands, one decode step of all rows, then one batch of images or one prefill chunk. A decode step is
started before the one before it is read, so the device never waits for Python. docs/engine.md has it on one screen.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, InvalidStateError, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeAlias

import mlx.core as mx

from mlxvlm.engine import admission, context, device
from mlxvlm.engine.admission import Admission
from mlxvlm.engine.asking import Asking
from mlxvlm.engine.caches import make_caches
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.constraints import Constraints
from mlxvlm.engine.decoding import Counts, Decoding, Ends
from mlxvlm.engine.draft_model import Draft, speculation
from mlxvlm.engine.failures import failure_of
from mlxvlm.engine.kv_layout import quantised
from mlxvlm.engine.request import FinishReason, Request
from mlxvlm.engine.rows import Alone, Ranks
from mlxvlm.engine.runner import ModelRunner
from mlxvlm.engine.scheduler import Scheduler
from mlxvlm.engine.sequence import Phase, Sequence
from mlxvlm.engine.stats import CacheStats, EngineStats
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import EngineClosedError, MlxvlmError, OverloadedError, UsageError
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.processors.base import Processor, Prompt

Command: TypeAlias = Callable[[], None]
Progress: TypeAlias = Callable[[int, int], None]  # bytes done, bytes in all
_CLOSED = "the engine was closed"
_LONGEST_SLEEP_S = 3600.0  # for a command; much more is too much for the system's clock
Build: TypeAlias = Callable[[Progress], VisionLanguageModel]


class Engine(Asking):
    """Submit requests from any thread; each answer comes through its own Stream.

    The constructor returns when the model is loaded, or raises what loading raised.
    """

    def __init__(
        self,
        build: Build,
        processor: Processor,
        config: EngineConfig,
        progress: Progress | None = None,
        draft: Draft | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """draft: a smaller model that guesses what this one will say. ranks: those who run the model together."""
        self.config = config
        self.processor = processor
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._open: dict[int, Sequence] = {}  # every sequence that has not ended
        self._lock = threading.Lock()  # around what is open, and whether more may be
        self._all_ended = threading.Condition(self._lock)
        self._refusing = False
        self._why_closed = _CLOSED
        self._next_deadline = math.inf
        self._counts = Counts()
        self._closing = threading.Event()
        self._ranks: Ranks = ranks or Alone()
        self._loaded: Future[None] = Future()
        self._ranks.watch(self.abandon)
        self._pool = ThreadPoolExecutor(config.num_workers, thread_name_prefix="mlxvlm-prepare")
        self._thread = threading.Thread(
            target=self._run, args=(build, progress, draft), name="mlxvlm-engine", daemon=True
        )
        # A daemon thread inside MLX must not outlive the interpreter.
        self._finalizer = weakref.finalize(self, _stop, self._closing, self._commands, self._thread)
        try:
            self._thread.start()
            self._loaded.result()
        except BaseException:  # also Ctrl-C, while the thread starts or loads
            self.close()
            raise

    def submit(self, request: Request) -> Stream:
        """Starts a request; all errors but these come through the stream.

        Raises UsageError for a bad parameter, OverloadedError when too many requests wait, EngineClosedError.
        """
        sampling = request.sampling or self.config.sampling
        sampling.check(self._vocab_size)
        # By number: a stream must not keep what the engine has forgotten.
        stream = Stream(lambda: self._commands.put(partial(self._cancel, number)))
        timeout_s = self.config.timeout_s if request.timeout_s is None else request.timeout_s
        sequence = Sequence(sampling, stream, _checked(timeout_s))
        number = sequence.id
        with self._lock:
            if self._refusing:
                raise EngineClosedError(self._why_closed)
            if len(self._open) - self._scheduler.num_running >= self.config.max_queue:
                raise OverloadedError(f"{self.config.max_queue} requests are waiting, which is the limit: try again")
            self._open[sequence.id] = sequence
            sequence.preparing = prepared = self._pool.submit(self._prepare, sequence, request)
        if sequence.deadline < math.inf:
            self._commands.put(partial(self._watch, sequence))
        prepared.add_done_callback(lambda future: self._commands.put(partial(self._prepared, sequence, future)))
        return stream

    def memory(self) -> device.MemoryReport:
        """MLX's memory counters of this process."""
        return device.memory()

    def stats(self) -> EngineStats:
        """How much runs, waits, is reserved and is kept; callable from any thread."""
        runner: ModelRunner | None = self.__dict__.get("_runner")
        running, budget, counts = self._scheduler.num_running, self._admission, self._counts
        return EngineStats(
            running=running,
            waiting=max(len(self._open) - running, 0),
            budget_bytes=budget.budget,
            model_bytes=budget.base,
            reserved_bytes=budget.reserved,
            steps=counts.steps,
            generated_tokens=counts.generated_tokens,
            drafted_tokens=counts.drafted_tokens,
            accepted_tokens=counts.accepted_tokens,
            prefix_cache=CacheStats() if runner is None else runner.prefixes.stats(),
            feature_cache=CacheStats() if runner is None else runner.features.stats(),
            encoded_images=0 if runner is None else runner.encoded_images,
        )

    def close(self, drain_s: float | None = None, why: str = _CLOSED) -> None:
        """Takes no more requests, gives those that run `drain_s` seconds, ends the rest with EngineClosedError.

        why: that error's message. Returns when memory is free and no thread is left; a picture that is being fetched
        is waited for.
        """
        with self._lock:
            if not self._refusing:
                self._refusing, self._why_closed = True, why
            if drain_s is not None:
                self._all_ended.wait_for(lambda: not self._open, drain_s)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._finalizer()
        with suppress(RuntimeError):  # it was never started
            self._thread.join()  # also where another thread closes at the same time
        self._pool.shutdown()
        with suppress(queue.Empty):  # what nobody will run holds on to prompts
            while True:
                self._commands.get_nowait()

    def abandon(self, error: MlxvlmError) -> None:
        """Ends every request with an error and takes no more, also while the engine's thread is in MLX for ever.

        Callable from any thread. Memory stays where it is: the process is to end.
        """
        with self._lock:
            self._refusing, self._why_closed = True, str(error)
            streams = [sequence.stream for sequence in self._open.values()]
        for stream in streams:
            stream.put(error)  # what comes after the first end is read by nobody
        with suppress(InvalidStateError):
            self._loaded.set_exception(error)
        self._closing.set()
        self._commands.put(lambda: None)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prepare(self, sequence: Sequence, request: Request) -> Prompt:
        """Runs in the pool."""
        if sequence.sampling.grammar is not None:
            sequence.constraint = self._constraints.compile(sequence.sampling.grammar)
        prompt = context.make_prompt(self.processor, self.config, request, sequence.sampling.max_tokens)
        if self.config.context_shift:
            sequence.keep = context.kept_beginning(self.processor, request, prompt)
        return prompt

    # Everything below runs on the engine thread.

    def _run(self, build: Build, progress: Progress | None, draft: Draft | None) -> None:
        try:
            if self._load(build, progress, draft):
                while not self._closing.is_set():
                    self._drain()
                    self._ranks.pulse(False)
                    failure = failure_of(self._tick)
                    if failure is not None:
                        self._ranks.doubt(failure)
                        self._decoding.pending = None
                        self._fail(self._all_open(), failure)
        finally:
            self._shut_down()

    def _load(self, build: Build, progress: Progress | None, draft: Draft | None) -> bool:
        def report(done: int, total: int) -> None:
            if self._closing.is_set():
                raise EngineClosedError("loading was interrupted")
            if progress is not None:
                progress(done, total)

        model: VisionLanguageModel | None = None
        try:
            device.configure()
            model = build(report)
            self._vocab_size = model.vocab_size
            guesses = speculation(self.config, self.processor, self._vocab_size, draft, report)
            budget = self.config.max_memory_bytes
            budget = device.default_budget() if budget is None else budget
            used = device.memory().active_bytes
            specs = quantised(model.kv_specs, self.config.kv_bits, self.config.kv_group_size)
            rows = self._ranks.rows(model, specs)
            budget = int(min(budget, used + self._ranks.free_bytes()))
            caches = make_caches(self.config, specs, budget - used)
            self._runner = ModelRunner(rows, *caches, self.config.prefill_chunk)
            self._constraints = Constraints(self.processor.tokenizer, self.config.eos_token_ids, self._vocab_size)
            ends = Ends(
                self._guarded, self._fail, self._forget, partial(Sequence.shift, max_context=self.config.max_context)
            )
            self._decoding = Decoding(self._runner, self._constraints, guesses, ends, self._counts)
            sizes = guesses.added_to(self._runner.sizes)
            self._admission = admission = Admission(budget, used, sizes)
            self._runner.spare = lambda: admission.spare
            self._scheduler = Scheduler(self.config.max_rows, self._admission)
        except BaseException as error:  # noqa: BLE001 - as in failure_of(); the constructor waits for it
            model = None  # whoever keeps the error keeps this frame
            with suppress(InvalidStateError):
                self._loaded.set_exception(error)
            return False
        with suppress(InvalidStateError):  # it was abandoned
            self._loaded.set_result(None)
        return True

    def _shut_down(self) -> None:
        with self._lock:
            self._refusing = True
            self._closing.set()
        self._fail(self._all_open(), EngineClosedError(self._why_closed))
        self.__dict__.pop("_decoding", None)
        runner: ModelRunner | None = self.__dict__.pop("_runner", None)
        if runner is not None:
            runner.prefixes.close()
            del runner
        self._ranks.close()
        self.__dict__.pop("_constraints", None)  # its threads
        mx.clear_cache()
        # Without this, MLX may abort the process at its exit.
        mx.clear_streams()

    def _drain(self) -> None:
        """Runs waiting commands; sleeps until the next deadline when there is nothing else to do."""
        idle = not self._scheduler.is_busy and self._decoding.pending is None
        self._ranks.pulse(idle)
        left = min(max(self._next_deadline - time.perf_counter(), 0.0), _LONGEST_SLEEP_S)
        with suppress(queue.Empty):
            if idle:
                self._commands.get(timeout=left if self._next_deadline < math.inf else None)()
            while not self._commands.empty():
                self._commands.get_nowait()()

    def _tick(self) -> None:
        self._expire()
        self._scheduler.grow()
        self._scheduler.admit()
        self._runner.make_way()
        decoding = self._scheduler.decoding
        self._decoding.advance(decoding)
        unit = self._scheduler.next_unit()
        if unit is not None:
            self._guarded([unit], partial(self._advance, unit, bool(decoding)))

    def _guarded(self, sequences: Seq[Sequence], work: Command) -> bool:
        """Whether work is done; an unexpected error becomes the error of the requests that it belongs to."""
        failure = failure_of(work)
        if failure is not None:
            self._ranks.doubt(failure)
            self._fail(sequences, failure)
        return failure is None

    def _fail(self, sequences: Seq[Sequence], failure: MlxvlmError) -> None:
        for sequence in sequences:
            sequence.fail(failure)
            self._forget(sequence)

    def _all_open(self) -> list[Sequence]:
        with self._lock:
            return list(self._open.values())

    def _advance(self, sequence: Sequence, is_decoding: bool) -> None:
        if not sequence.started:
            sequence.start_clock()
        if not sequence.recalled:
            self._runner.recall(sequence)
        if not sequence.recalled:
            return
        if sequence.phase is Phase.VISION:
            begun = time.perf_counter()
            self._runner.encode_images(sequence)
            sequence.vision_s += time.perf_counter() - begun
        else:
            config = self.config
            self._runner.prefill(sequence, config.prefill_chunk_while_decoding if is_decoding else config.prefill_chunk)

    def _prepared(self, sequence: Sequence, future: Future[Prompt]) -> None:
        """A prompt comes out of the pool, or the error of making it."""
        sequence.preparing = None
        if not sequence.done:
            self._guarded([sequence], partial(self._begin, sequence, future))

    def _begin(self, sequence: Sequence, future: Future[Prompt]) -> None:
        if future.cancelled():
            raise EngineClosedError(self._why_closed)
        prompt = future.result()
        config = self.config
        admission.check(prompt, self.processor.image_token_id, self._vocab_size, config.max_context)
        max_tokens, longest, room = context.limits(config, prompt, sequence.sampling.max_tokens)
        need = self._admission.need(prompt, max_tokens, config.max_context if longest > room else 0)
        self._admission.check(need)
        pixels = sum(int(image.pixels.nbytes) for image in prompt.images)
        if self._scheduler.queued_bytes and self._scheduler.queued_bytes + pixels > config.max_queue_bytes:
            raise OverloadedError("the pictures of waiting requests fill the queue: try again")
        sequence.begin(prompt, self.processor, max_tokens, config.eos_token_ids)
        sequence.need, sequence.longest, sequence.full = need, longest, room
        self._scheduler.add(sequence)

    def _watch(self, sequence: Sequence) -> None:
        self._next_deadline = min(self._next_deadline, sequence.deadline)

    def _expire(self) -> None:
        """Ends what is out of time, in whatever phase it is."""
        now = time.perf_counter()
        if now < self._next_deadline:
            return
        for sequence in self._all_open():
            if sequence.deadline <= now:
                self._finish(sequence, "timeout")
        self._next_deadline = min((sequence.deadline for sequence in self._all_open()), default=math.inf)

    def _cancel(self, number: int) -> None:
        sequence = self._open.get(number)
        if sequence is not None:
            self._finish(sequence, "cancelled")

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """Ends an answer with what there is."""
        self._guarded([sequence], partial(sequence.cancel, reason))
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        """Frees all that an ended sequence holds."""
        self._decoding.forget(sequence)
        self._scheduler.remove(sequence)  # last: what the caches take until then is beside what is reserved
        if sequence.preparing is not None:
            sequence.preparing.cancel()
            sequence.preparing = None  # whose callback holds the sequence, and this engine
        with self._lock:
            self._open.pop(sequence.id, None)
            if not self._open:
                self._all_ended.notify_all()


def _checked(seconds: float | None) -> float | None:
    if seconds is not None and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
        raise UsageError(f"timeout_s must be a number of seconds above 0, not {seconds!r}")
    return seconds


def _stop(closing: threading.Event, commands: queue.SimpleQueue[Command], thread: threading.Thread) -> None:
    closing.set()
    commands.put(lambda: None)
    with suppress(RuntimeError):  # it was never started
        thread.join()
