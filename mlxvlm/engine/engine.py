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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeAlias

import mlx.core as mx

from mlxvlm.engine import admission, device
from mlxvlm.engine.admission import Admission
from mlxvlm.engine.caches import make_caches
from mlxvlm.engine.config import EngineConfig
from mlxvlm.engine.constraints import Constraints
from mlxvlm.engine.failures import failure_of
from mlxvlm.engine.request import Completion, FinishReason, Request
from mlxvlm.engine.runner import ModelRunner, Step
from mlxvlm.engine.sampler import read
from mlxvlm.engine.scheduler import Scheduler
from mlxvlm.engine.sequence import Phase, Sequence
from mlxvlm.engine.stats import CacheStats, EngineStats
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import EngineClosedError, InputError, InternalError, MlxvlmError, OverloadedError, UsageError
from mlxvlm.models.base import VisionLanguageModel
from mlxvlm.processors.base import Processor, Prompt, check_messages

Command: TypeAlias = Callable[[], None]
Progress: TypeAlias = Callable[[int, int], None]  # bytes done, bytes in all
_LONGEST_SLEEP_S = 3600.0  # for a command; much more is too much for the system's clock
Build: TypeAlias = Callable[[Progress], VisionLanguageModel]


class Engine:
    """Submit requests from any thread; each answer comes through its own Stream.

    The constructor returns when the model is loaded, or raises what loading raised.
    """

    def __init__(
        self, build: Build, processor: Processor, config: EngineConfig, progress: Progress | None = None
    ) -> None:
        self.config = config
        self.processor = processor
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._open: dict[int, Sequence] = {}  # every sequence that has not ended
        self._lock = threading.Lock()  # around what is open, and whether more may be
        self._all_ended = threading.Condition(self._lock)
        self._refusing = False
        self._pending: Step | None = None
        self._next_deadline = math.inf
        self._steps = self._generated = 0
        self._closing = threading.Event()
        self._loaded: Future[None] = Future()
        self._pool = ThreadPoolExecutor(config.num_workers, thread_name_prefix="mlxvlm-prepare")
        self._thread = threading.Thread(target=self._run, args=(build, progress), name="mlxvlm-engine", daemon=True)
        self._thread.start()
        # A daemon thread inside MLX must not outlive the interpreter.
        self._finalizer = weakref.finalize(self, _stop, self._closing, self._commands, self._thread)
        try:
            self._loaded.result()
        except BaseException:  # also Ctrl-C while loading
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
                raise EngineClosedError("the engine is closed")
            if len(self._open) - self._scheduler.num_running >= self.config.max_queue:
                raise OverloadedError(f"{self.config.max_queue} requests are waiting, which is the limit: try again")
            self._open[sequence.id] = sequence
            prepared = self._pool.submit(self._prepare, sequence, request)
        sequence.preparing = prepared
        if sequence.deadline < math.inf:
            self._commands.put(partial(self._watch, sequence))
        prepared.add_done_callback(lambda future: self._commands.put(partial(self._prepared, sequence, future)))
        return stream

    def generate(self, request: Request) -> Completion:
        """Waits for a whole answer."""
        return self.submit(request).result()

    def memory(self) -> device.MemoryReport:
        """MLX's memory counters of this process."""
        return device.memory()

    def stats(self) -> EngineStats:
        """How much runs, waits, is reserved and is kept; callable from any thread."""
        runner: ModelRunner | None = self.__dict__.get("_runner")
        running, budget = self._scheduler.num_running, self._admission
        return EngineStats(
            running=running,
            waiting=max(len(self._open) - running, 0),
            budget_bytes=budget.budget,
            model_bytes=budget.base,
            reserved_bytes=budget.reserved,
            steps=self._steps,
            generated_tokens=self._generated,
            prefix_cache=CacheStats() if runner is None else runner.prefixes.stats(),
            feature_cache=CacheStats() if runner is None else runner.features.stats(),
            encoded_images=0 if runner is None else runner.encoded_images,
        )

    def close(self, drain_s: float | None = None) -> None:
        """Takes no more requests, gives those that run `drain_s` seconds, ends the rest with EngineClosedError.

        Returns when memory is free and no thread is left; a picture that is being fetched is waited for.
        """
        with self._lock:
            self._refusing = True
            if drain_s is not None:
                self._all_ended.wait_for(lambda: not self._open, drain_s)
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._finalizer()
        self._thread.join()  # also where another thread closes at the same time
        self._pool.shutdown()
        with suppress(queue.Empty):  # what nobody will run holds on to prompts
            while True:
                self._commands.get_nowait()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prepare(self, sequence: Sequence, request: Request) -> Prompt:
        """Runs in the pool."""
        if sequence.sampling.grammar is not None:
            sequence.constraint = self._constraints.compile(sequence.sampling.grammar)
        if request.prompt is not None:
            return request.prompt
        check_messages(request.messages)
        num_images, limit = sum(len(message.images) for message in request.messages), self.config.max_images
        if num_images > limit:
            raise InputError(f"the request has {num_images} images, but the limit is {limit}: send fewer")
        return self.processor(request.messages, request.template, request.image_options)

    # Everything below runs on the engine thread.

    def _run(self, build: Build, progress: Progress | None) -> None:
        try:
            if self._load(build, progress):
                while not self._closing.is_set():
                    self._drain()
                    failure = failure_of(self._tick)
                    if failure is not None:
                        self._pending = None
                        self._fail(self._all_open(), failure)
        finally:
            self._shut_down()

    def _load(self, build: Build, progress: Progress | None) -> bool:
        def report(done: int, total: int) -> None:
            if self._closing.is_set():
                raise EngineClosedError("loading was interrupted")
            if progress is not None:
                progress(done, total)

        try:
            device.configure()
            model = build(report)
            budget = self.config.max_memory_bytes
            budget = device.default_budget() if budget is None else budget
            used = device.memory().active_bytes
            caches = make_caches(self.config, model.kv_specs, budget - used)
            self._runner = ModelRunner(model, *caches, self.config.prefill_chunk)
            self._vocab_size = model.vocab_size
            self._constraints = Constraints(self.processor.tokenizer, self.config.eos_token_ids, self._vocab_size)
            self._admission = rows = Admission(budget, used, self._runner.sizes)
            self._runner.spare = lambda: rows.spare
            self._scheduler = Scheduler(self.config.max_rows, self._admission)
        except Exception as error:  # noqa: BLE001 - the top of the engine thread
            self._loaded.set_exception(error)
            return False
        self._loaded.set_result(None)
        return True

    def _shut_down(self) -> None:
        with self._lock:
            self._refusing = True
            self._closing.set()
        self._fail(self._all_open(), EngineClosedError("the engine was closed"))
        self._pending = None
        runner: ModelRunner | None = self.__dict__.pop("_runner", None)
        if runner is not None:
            runner.prefixes.close()
            del runner
        self.__dict__.pop("_constraints", None)  # its threads
        mx.clear_cache()
        # Without this, MLX may abort the process at its exit.
        mx.clear_streams()

    def _drain(self) -> None:
        """Runs waiting commands; sleeps until the next deadline when there is nothing else to do."""
        idle = not self._scheduler.is_busy and self._pending is None
        left = min(max(self._next_deadline - time.perf_counter(), 0.0), _LONGEST_SLEEP_S)
        with suppress(queue.Empty):
            while True:
                self._commands.get(block=idle, timeout=left if self._next_deadline < math.inf else None)()
                idle = False

    def _tick(self) -> None:
        self._expire()
        self._scheduler.grow()
        self._scheduler.admit()
        self._runner.make_way()
        decoding = self._scheduler.decoding
        self._decode(decoding)
        unit = self._scheduler.next_unit()
        if unit is not None:
            self._guarded([unit], partial(self._advance, unit, bool(decoding)))

    def _guarded(self, sequences: Seq[Sequence], work: Command) -> bool:
        """Whether work is done; an unexpected error becomes the error of the requests that it belongs to."""
        failure = failure_of(work)
        if failure is not None:
            self._fail(sequences, failure)
        return failure is None

    def _fail(self, sequences: Seq[Sequence], failure: MlxvlmError) -> None:
        for sequence in sequences:
            sequence.fail(failure)
            self._forget(sequence)

    def _all_open(self) -> list[Sequence]:
        with self._lock:
            return list(self._open.values())

    def _decode(self, decoding: list[Sequence]) -> None:
        """Starts a step, then reads the one before: some of its rows may have had their last in it."""
        previous, self._pending = self._pending, None
        owners = set(self._runner.batch.owners)
        rows = [sequence for sequence in decoding if sequence.id in owners]
        if rows and failure_of(partial(self._launch, rows, previous)):
            self._launch_without_culprits(rows, previous)
        self._retire()
        if previous is not None:
            self._guarded(previous.rows, partial(self._deliver, previous))
        if self._pending is not None and self._pending.sampled is None:
            self._guarded(self._pending.rows, self._choose)
        on_their_way = owners if previous is None else owners | {row.id for row in previous.rows}
        for row in decoding:
            # Neither in the batch nor with its last token on the way: it would never end.
            if row.id not in on_their_way:
                self._fail([row], InternalError("the request has lost its keys and values"))

    def _launch(self, rows: list[Sequence], previous: Step | None) -> None:
        self._pending = self._runner.decode(rows, previous)
        self._steps += 1

    def _launch_without_culprits(self, rows: list[Sequence], previous: Step | None) -> None:
        """A step has failed: rows that also fail alone end, the others get the step once more."""
        rest = [row for row in rows if self._guarded([row], partial(self._runner.attempt, row, previous))]
        if rest:
            self._guarded(rest, partial(self._launch, rest, previous))

    def _retire(self) -> None:
        """Rows whose last token is on its way leave the batch. What is kept of them may bring the step's own error."""
        step = self._pending
        for row in [] if step is None else step.rows:
            if step is not None and row.launched >= row.max_tokens:
                self._guarded(step.rows, partial(self._runner.drop, row))

    def _choose(self) -> None:
        """Samples a step that waited for the tokens before it: the device has its forward pass to do meanwhile."""
        step, self._pending = self._pending, None
        assert step is not None
        rows = [(row.constraint, row.token_ids) if row.constraint else None for row in step.rows]
        masks = self._constraints.masks(rows) if any(rows) else None
        for row in step.rows:
            if row.constraint is not None and row.constraint.error is not None:
                self._fail([row], InputError(row.constraint.error))
        self._pending = self._runner.choose(step, masks)

    def _deliver(self, step: Step) -> None:
        """Reads a step and hands its tokens out; rows that ended in the meantime are passed over."""
        assert step.sampled is not None
        results = read(step.sampled, [row.sampler for row in step.rows])
        for row, (token_id, is_bad, logprob) in zip(step.rows, results, strict=True):
            if row.done:
                continue
            if is_bad:
                self._fail([row], InternalError("the model produced NaN for this request"))
            elif self._guarded([row], partial(row.accept, token_id, logprob)):
                self._generated += 1
                if row.done:
                    self._forget(row)

    def _advance(self, sequence: Sequence, is_decoding: bool) -> None:
        if not sequence.started:
            sequence.start_clock()
        if not sequence.recalled:
            self._runner.recall(sequence)
        if not sequence.recalled:
            return
        if sequence.phase is Phase.VISION:
            self._runner.encode_images(sequence)
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
            raise EngineClosedError("the engine was closed")
        prompt = future.result()
        config = self.config
        admission.check(prompt, self.processor.image_token_id, self._vocab_size, config.max_context)
        room = config.max_context - len(prompt.token_ids)
        wanted = sequence.sampling.max_tokens
        max_tokens = min(admission.ANSWER_STEP if wanted is None else wanted, room)
        need = self._admission.need(prompt, max_tokens)
        self._admission.check(need)
        pixels = sum(int(image.pixels.nbytes) for image in prompt.images)
        if self._scheduler.queued_bytes and self._scheduler.queued_bytes + pixels > config.max_queue_bytes:
            raise OverloadedError("the pictures of waiting requests fill the queue: try again")
        sequence.begin(prompt, self.processor, max_tokens, config.eos_token_ids)
        sequence.need, sequence.longest = need, room if wanted is None else max_tokens
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
        # Keeping its keys and values waits for the step under way, and may be where that step's error shows.
        under_way = [] if self._pending is None else self._pending.rows
        self._guarded(under_way, partial(self._runner.drop, sequence))
        self._scheduler.remove(sequence)  # last: what the caches take until then is beside what is reserved
        if sequence.preparing is not None:
            sequence.preparing.cancel()
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
    thread.join()
