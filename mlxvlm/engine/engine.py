"""One thread that owns MLX: it loads a model and answers requests from any thread. Knows no family and no door.

Each tick: commands, one decode step of all rows, then one batch of images or one prefill chunk. A decode step is
started before the one before it is read, so the device never waits for Python.
"""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from collections.abc import Sequence as Seq
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

import mlx.core as mx

from mlxvlm.engine import device
from mlxvlm.engine.block_files import BlockFiles
from mlxvlm.engine.constraints import Constraints
from mlxvlm.engine.feature_cache import FeatureCache
from mlxvlm.engine.params import SamplingParams
from mlxvlm.engine.prefix_cache import BLOCK_TOKENS, PrefixCache
from mlxvlm.engine.request import Completion, Request
from mlxvlm.engine.runner import ModelRunner, Step
from mlxvlm.engine.sampler import read
from mlxvlm.engine.scheduler import Scheduler
from mlxvlm.engine.sequence import Phase, Sequence
from mlxvlm.engine.stats import EngineStats
from mlxvlm.engine.stream import Stream
from mlxvlm.errors import ContextLengthError, EngineClosedError, InputError, InternalError, MlxvlmError, UsageError
from mlxvlm.models.base import KVSpec, VisionLanguageModel
from mlxvlm.processors.base import Processor, Prompt, check_messages

Command: TypeAlias = Callable[[], None]
Progress: TypeAlias = Callable[[int, int], None]  # bytes done, bytes in all
Build: TypeAlias = Callable[[Progress], VisionLanguageModel]

# Of what both caches get. A picture's features take a 64th (LLaVA-1.5) to an eighth (Qwen2-VL-7B) of its keys and
# values, but serve for longer; cross-attention families have little else of a picture.
_FEATURE_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What the engine must know beside the model. Token counts."""

    max_context: int
    eos_token_ids: frozenset[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)  # of requests that bring none
    max_rows: int = 16
    prefill_chunk: int = 2048
    prefill_chunk_while_decoding: int = 256  # a long prompt must not stall running streams
    max_images: int = 64  # of one request
    num_workers: int = 2  # threads that prepare prompts and images
    # Kept between requests; None: what device.cache_budget() gives both together. 0: nothing.
    prefix_cache_bytes: int | None = None
    feature_cache_bytes: int | None = None
    prefix_block_tokens: int = BLOCK_TOKENS  # of which only whole ones are kept
    # Blocks that were used twice are kept here too, for the next start of the same model: model_id must tell
    # checkpoint, revision, quantisation and dtype.
    prefix_cache_dir: Path | None = None
    prefix_cache_dir_bytes: int = 10 << 30
    model_id: str = ""


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
        self._scheduler = Scheduler(config.max_rows)
        self._open: dict[int, Sequence] = {}  # every sequence that has not ended
        self._lock = threading.Lock()  # nothing opens once closing has begun
        self._pending: Step | None = None
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
        """Starts a request. Raises UsageError for a bad parameter; all later errors come through the stream."""
        sampling = request.sampling or self.config.sampling
        sampling.check(self._vocab_size)
        stream = Stream(lambda: self._commands.put(partial(self._cancel, sequence)))
        sequence = Sequence(sampling, stream)
        with self._lock:
            if self._closing.is_set():
                raise EngineClosedError("the engine is closed")
            self._open[sequence.id] = sequence
            prepared = self._pool.submit(self._prepare, sequence, request)
        prepared.add_done_callback(lambda future: self._commands.put(partial(self._prepared, sequence, future)))
        return stream

    def generate(self, request: Request) -> Completion:
        """Waits for a whole answer."""
        return self.submit(request).result()

    def memory(self) -> device.MemoryReport:
        """MLX's memory counters of this process."""
        return device.memory()

    def stats(self) -> EngineStats:
        """Counters of the caches; zeros once the engine is closed."""
        runner: ModelRunner | None = self.__dict__.get("_runner")
        return EngineStats() if runner is None else runner.stats()

    def close(self) -> None:
        """Ends every request with EngineClosedError, frees the model and waits for the thread."""
        with self._lock:
            self._closing.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._finalizer()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _prepare(self, sequence: Sequence, request: Request) -> Prompt:
        """Runs in the pool."""
        if sequence.sampling.grammar is not None:
            sequence.constraint = self._constraints.compile(sequence.sampling.grammar)
        return _prepare(self.processor, request, self.config.max_images)

    # Everything below runs on the engine thread.

    def _run(self, build: Build, progress: Progress | None) -> None:
        try:
            if self._load(build, progress):
                while not self._closing.is_set():
                    self._drain()
                    self._tick()
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
            self._runner = ModelRunner(model, *_caches(self.config, model.kv_specs))
            self._vocab_size = self._runner.model.vocab_size
            self._constraints = Constraints(self.processor.tokenizer, self.config.eos_token_ids, self._vocab_size)
        except Exception as error:  # noqa: BLE001 - the top of the engine thread
            self._loaded.set_exception(error)
            return False
        self._loaded.set_result(None)
        return True

    def _shut_down(self) -> None:
        with self._lock:
            self._closing.set()
        for sequence in list(self._open.values()):
            sequence.fail(EngineClosedError("the engine was closed"))
        self._open.clear()
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
        """Runs waiting commands; sleeps when there is nothing else to do."""
        idle = not self._scheduler.is_busy and self._pending is None
        try:
            while True:
                self._commands.get(block=idle)()
                idle = False
        except queue.Empty:
            return

    def _tick(self) -> None:
        self._scheduler.admit()
        decoding = self._scheduler.decoding
        self._decode(decoding)
        unit = self._scheduler.next_unit()
        if unit is not None:
            self._guarded([unit], partial(self._advance, unit, bool(decoding)))
        self._scheduler.admit()

    def _guarded(self, sequences: Seq[Sequence], work: Callable[[], None]) -> None:
        """The one place where an unexpected error becomes the error of the requests it belongs to."""
        try:
            work()
        except Exception as error:  # noqa: BLE001 - the top of the engine thread
            failure = _as_failure(error)
            for sequence in sequences:
                sequence.fail(failure)
                self._forget(sequence)

    def _decode(self, decoding: list[Sequence]) -> None:
        """Starts a step, then reads the one before: some of its rows may have had their last in it."""
        previous, self._pending = self._pending, None
        owners = set(self._runner.batch.owners)
        if owners:
            rows = [sequence for sequence in decoding if sequence.id in owners]
            self._guarded(rows, partial(self._launch, rows, previous))
        if previous is not None:
            self._guarded(previous.rows, partial(self._deliver, previous))
        if self._pending is not None and self._pending.sampled is None:
            self._guarded(self._pending.rows, self._choose)

    def _launch(self, rows: list[Sequence], previous: Step | None) -> None:
        self._pending = self._runner.decode(rows, previous)

    def _choose(self) -> None:
        """Samples a step that waited for the tokens before it: the device has its forward pass to do meanwhile."""
        step, self._pending = self._pending, None
        assert step is not None
        rows = [(row.constraint, row.token_ids) if row.constraint else None for row in step.rows]
        masks = self._constraints.masks(rows) if any(rows) else None
        for row in step.rows:
            if row.constraint is not None and row.constraint.error is not None:
                row.fail(InputError(row.constraint.error))
                self._forget(row)
        self._pending = self._runner.choose(step, masks)

    def _deliver(self, step: Step) -> None:
        """Reads a step and hands its tokens out; rows that ended in the meantime are passed over."""
        assert step.sampled is not None
        results = read(step.sampled, [row.sampler for row in step.rows])
        for row, (token_id, is_bad, logprob) in zip(step.rows, results, strict=True):
            if row.done:
                continue
            if is_bad:
                row.fail(InternalError("the model produced NaN for this request"))
            else:
                row.accept(token_id, logprob)
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
        if sequence.done:
            return
        error = EngineClosedError("the engine was closed") if future.cancelled() else future.exception()
        if error is None:
            error = self._unfit(future.result())
        if error is not None:
            sequence.fail(_as_failure(error))
            self._forget(sequence)
        else:
            self._guarded([sequence], partial(self._begin, sequence, future.result()))

    def _begin(self, sequence: Sequence, prompt: Prompt) -> None:
        room = self.config.max_context - len(prompt.token_ids)
        max_tokens = min(sequence.sampling.max_tokens or room, room)
        sequence.begin(prompt, self.processor, max_tokens, self.config.eos_token_ids)
        self._scheduler.add(sequence)

    def _unfit(self, prompt: Prompt) -> MlxvlmError | None:
        """Why a prompt can't be answered, None if it can."""
        length, limit = len(prompt.token_ids), self.config.max_context
        if not length:
            return InputError("the prompt is empty")
        # MLX reads beyond an embedding's end without a word. A placeholder's own row is never used.
        foreign = {i for i in prompt.token_ids if not 0 <= i < self._vocab_size} - {self.processor.image_token_id}
        if foreign:
            return InputError(
                f"the prompt has token id {min(foreign)}, but the model's vocabulary ends at {self._vocab_size}: "
                "the tokenizer is not this model's"
            )
        if length >= limit:
            images = prompt.token_ids.count(self.processor.image_token_id) if prompt.images else 0
            of_images = f" ({images} of them for images)" if images else ""
            return ContextLengthError(
                f"the prompt has {length} tokens{of_images}, but the model's context is {limit}: "
                "shorten it or send fewer images"
            )
        if prompt.images and prompt.images[-1].span[1] == length:
            # Decoding starts from the last token's own embedding.
            return InputError("the prompt ends with an image: the chat template must add text after it")
        return None

    def _cancel(self, sequence: Sequence) -> None:
        sequence.cancel()
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self._open.pop(sequence.id, None)
        # Keeping its keys and values waits for the step under way, and may be where that step's error shows.
        under_way = [] if self._pending is None else self._pending.rows
        self._guarded(under_way, partial(self._runner.drop, sequence))


def _caches(config: EngineConfig, specs: Seq[KVSpec]) -> tuple[PrefixCache, FeatureCache]:
    """Made when the model is loaded, as they share what it leaves free."""
    files, root = None, sha256(repr((1, config.model_id, list(specs))).encode()).digest()
    if config.prefix_cache_dir is not None:
        if not config.model_id:
            raise UsageError("prefix_cache_dir needs a model_id: models that share files must be told apart")
        files = BlockFiles(config.prefix_cache_dir, config.prefix_cache_dir_bytes)
    budget = device.cache_budget()
    of_features = int(budget * _FEATURE_SHARE)
    prefixes, features = config.prefix_cache_bytes, config.feature_cache_bytes
    return (
        PrefixCache(budget - of_features if prefixes is None else prefixes, config.prefix_block_tokens, root, files),
        FeatureCache(of_features if features is None else features),
    )


def _prepare(processor: Processor, request: Request, max_images: int) -> Prompt:
    if request.prompt is not None:
        return request.prompt
    check_messages(request.messages)
    num_images = sum(len(message.images) for message in request.messages)
    if num_images > max_images:
        raise InputError(f"the request has {num_images} images, but the limit is {max_images}: send fewer")
    return processor(request.messages, request.template, request.image_options)


def _as_failure(error: BaseException) -> MlxvlmError:
    if isinstance(error, MlxvlmError):
        return error
    failure = InternalError(f"{type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


def _stop(closing: threading.Event, commands: queue.SimpleQueue[Command], thread: threading.Thread) -> None:
    closing.set()
    commands.put(lambda: None)
    thread.join()
