"""The engine: one base, its committee, and the few calls that users make."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from whispers_kernels.ops import check_impl

from . import auto
from .chat import ChatEncoder, Question, load_tokenizer
from .config import DTYPES, ModelConfig
from .decode import Decoder
from .errors import WhispersError
from .experts import Committee, Expert
from .intake import Intake
from .model import Model
from .panel import Panel
from .pull import BUILT_IN, pull
from .reading import MeanReader, Reader
from .request import Answer, Done, Event, Failed, Request, Scored, ScoreResult
from .router import Router
from .sampling import SamplingParams
from .scheduler import Scheduler
from .task import Task
from .weights import Checkpoint, load_weights


class Engine:
    """A frozen base and a committee of soft-prompt experts that answer together.

    Not safe for use by several threads at once.

    Args:
        model: a local Hugging Face folder, a hub id, or a built-in name (pulled on first use).
        committee: its folder; None: the base alone, until experts are added.
        device: "auto" (cuda where there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto" (on a GPU as stored; on a CPU bfloat16 where it multiplies that, else float32), "float32", "bfloat16", "float16".
        quantization: None, or "int8" (on a CPU): the layers' matrices, with one scale an output; the head stays as it is.
        kv_cache_dtype: "auto", the model's.
        kv_cache_tokens: size of the page pool in positions; None: on a GPU 85 % of the memory that the weights leave free, on a CPU four
            of the base's longest contexts, within a quarter of the memory.
        page_size: positions a page; None: chosen for the device.
        max_num_seqs: branches that run at once.
        max_num_batched_tokens: rows a step; None: chosen for the device.
        tensor_parallel_size: 1.
        chat_template_kwargs: for the base's chat template; a thinking switch is off unless they set it.
        impl: the kernels' implementation; a named one never falls back.
        enforce_eager: run decode steps kernel by kernel on a GPU too, instead of as captured CUDA graphs.

    Raises:
        WhispersError: anything of these that cannot be had, and why.
    """

    def __init__(
        self,
        model: str | Path,
        committee: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantization: str | None = None,
        kv_cache_dtype: str = "auto",
        kv_cache_tokens: int | None = None,
        page_size: int | None = None,
        max_num_seqs: int = 256,
        max_num_batched_tokens: int | None = None,
        tensor_parallel_size: int = 1,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        impl: str = "auto",
        enforce_eager: bool = False,
    ):
        for name, value, accepted in (
            ("kv_cache_dtype", kv_cache_dtype, "auto"),
            ("tensor_parallel_size", tensor_parallel_size, 1),
        ):
            if value != accepted:
                raise WhispersError(f"{name}: {value!r} is not available in this version; accepted: {accepted!r}")
        if dtype != "auto" and dtype not in DTYPES:
            raise WhispersError(f"dtype: {dtype!r}; accepted: auto, {', '.join(DTYPES)}")
        where = device_of(device)
        try:
            impl = check_impl(impl, where)
        except ValueError as error:
            raise WhispersError(str(error)) from error
        if quantization is not None and (quantization != "int8" or impl != "cpp"):
            raise WhispersError(
                f"quantization: {quantization!r} with impl {impl!r}; accepted: None, or 'int8' with the C++ kernels ('cpp')"
            )
        page_size = auto.auto_page_size(where, impl) if page_size is None else page_size
        if max_num_batched_tokens is None:
            max_num_batched_tokens = max(max_num_seqs, 8192 if where.type == "cuda" else 512)
        for name, size, least in (
            ("page_size", page_size, 1),
            ("max_num_seqs", max_num_seqs, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("kv_cache_tokens", kv_cache_tokens, page_size),
        ):
            if size is not None and (not isinstance(size, int) or size < least):
                raise WhispersError(f"{name}: {size!r}; accepted: an integer, at least {least}")

        loaded = None if committee is None else Committee.load(committee)
        folder = base_folder(model)
        self.model_name = str(Path(model).resolve() if Path(model).is_dir() else model)
        config = ModelConfig.load(folder)
        checkpoint = Checkpoint(folder)
        self.fingerprint = checkpoint.fingerprint(config)
        if loaded is not None and loaded.fingerprint != self.fingerprint:
            raise WhispersError(
                f"{committee}: made for the base {loaded.base_name} ({loaded.fingerprint}); {model} is {self.fingerprint}"
            )
        torch_dtype = auto.auto_dtype(where, impl, DTYPES[config.dtype]) if dtype == "auto" else DTYPES[dtype]
        self.tokenizer = load_tokenizer(folder)
        self.chat = ChatEncoder(self.tokenizer, config.vocab_size, chat_template_kwargs)
        self.model = Model(config, load_weights(checkpoint, config, torch_dtype, where), impl, quantization)
        pages = _pool_pages(config, torch_dtype, where, kv_cache_tokens, page_size)
        self.pool = self.model.new_pool(pages, page_size)
        # Kernels that take a plan as work; the reference waits for the device, and lays everything out anew anyway.
        graphs = where.type == "cuda" and not enforce_eager and impl == "triton"
        decoder = Decoder(self.model, self.pool, capture=graphs) if graphs or impl == "cpp" else None
        self._scheduler = Scheduler(self.model, self.pool, max_num_seqs, max_num_batched_tokens, decoder)
        self._panel = Panel(self._scheduler, self.fingerprint)
        self._intake = Intake(self._scheduler, self._panel, self.chat, self.fingerprint)
        self._inbox: list[Event] = []  # events of submitted requests, until `step` hands them out
        self._submitted: dict[int, Task] = {}
        if loaded is not None:
            self._panel.add(loaded.experts)
            self.router = loaded.router

    # --- experts ---------------------------------------------------------------------------------------------------------------

    @property
    def experts(self) -> list[str]:
        """Names, in the order they were added."""
        return self._panel.names

    def add_expert(self, expert: Expert | str | Path) -> None:
        """Adds an expert, or the one in a folder; a soft prompt in front is computed and pinned now.

        Raises:
            WhispersError: a name that is taken, another base, another width, or a pool that has no room for its pages.
        """
        self._panel.add([expert if isinstance(expert, Expert) else Expert.load(expert)])

    def remove_expert(self, name: str) -> None:
        """Forgets an expert. Requests that it is answering go on. Raises WhispersError for an unknown name."""
        self._panel.remove(name)

    def expert(self, name: str) -> Expert:
        """The expert of that name. Raises WhispersError for an unknown one."""
        return self._panel[name].expert

    @property
    def router(self) -> Router | None:
        """Chooses the experts of requests that name none; the committee's own, where its folder has one."""
        return self._intake.router

    @router.setter
    def router(self, router: Router | None) -> None:
        """Raises WhispersError for a router that reads another base's hidden states."""
        config = self.model.config
        if router is not None and (router.layer > config.num_layers or router.hidden != config.hidden_size):
            raise WhispersError(
                f"router: reads layer {router.layer} of width {router.hidden}; accepted: up to layer "
                f"{config.num_layers}, width {config.hidden_size}"
            )
        self._intake.router = router

    def read(self, questions: Sequence[Question], reader: Reader | int) -> Tensor:
        """What a router reads of the users' own words, float32 `[questions, width]` on the CPU.

        Args:
            questions: each as a `Request`'s; at least one.
            reader: a router's; or a layer, whose mean hidden state is read (0: the embeddings; the number of layers: the final,
                normalised states; as transformers' `hidden_states`).

        Raises:
            WhispersError: a layer or question that is refused, before any work.
        """
        reader = reader if isinstance(reader, Reader) else MeanReader(self._layer(reader))
        self._layer(reader.layer)
        return torch.stack(self._read(questions, reader))

    def read_tokens(self, questions: Sequence[Question], layer: int) -> list[Tensor]:
        """The hidden states at a layer of the users' own words, one float32 `[tokens, hidden]` on the CPU a question. As `read`."""
        return self._read(questions, self._layer(layer))

    def _layer(self, layer: int) -> int:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer <= self.model.config.num_layers:
            raise WhispersError(f"layer: {layer!r}; accepted: 0 to {self.model.config.num_layers}")
        return layer

    def _read(self, questions: Sequence[Question], reader: Reader | int) -> list[Tensor]:
        found: dict[int, Tensor] = {}
        tasks = [
            self._intake.read(question, reader, partial(found.__setitem__, at)) for at, question in enumerate(questions)
        ]
        for task in tasks:
            self._scheduler.add(task)
        try:
            while len(found) < len(tasks):
                self._scheduler.step()
        finally:
            for task in tasks:
                self._scheduler.abort(task)
        return [found[at] for at in range(len(tasks))]

    # --- requests --------------------------------------------------------------------------------------------------------------

    def ask(
        self,
        question: Question,
        options: Sequence[str | Sequence[int]] | None = None,
        experts: Sequence[str] | Mapping[str, float] | None = None,
        top_k: int = 3,
        aggregate: str = "vote",
        profile: Mapping[str, str] | None = None,
        sampling: SamplingParams | None = None,
        early_end: bool = True,
        answer_pattern: str | None = None,
    ) -> Answer:
        """Asks a committee and makes one answer of many; the arguments are those of `Request`.

        Raises:
            WhispersError: anything in the request that is refused, before any work.
        """
        for event in self.stream(
            question, options, experts, top_k, aggregate, profile, sampling, early_end, answer_pattern
        ):
            if isinstance(event, Done):
                return event.answer
        raise AssertionError("a stream ended without an answer")

    def stream(
        self,
        question: Question,
        options: Sequence[str | Sequence[int]] | None = None,
        experts: Sequence[str] | Mapping[str, float] | None = None,
        top_k: int = 3,
        aggregate: str = "vote",
        profile: Mapping[str, str] | None = None,
        sampling: SamplingParams | None = None,
        early_end: bool = True,
        answer_pattern: str | None = None,
    ) -> Iterator[Event]:
        """As `ask`, with events as they happen; the last is `Done`. A bad request is refused at once; work starts with the first event.

        Closing the iterator early gives all pages back.
        """
        sampling = SamplingParams() if sampling is None else sampling
        events: deque[Event] = deque()
        request = Request(question, options, experts, top_k, aggregate, profile, sampling, early_end, answer_pattern)
        return _Stream(self._scheduler, self._intake.task(request, events.append), events)

    def score(
        self,
        context: Question,
        options: Sequence[str | Sequence[int]],
        experts: Sequence[str] | Mapping[str, float] | None = None,
    ) -> ScoreResult:
        """How likely every expert finds every option as the answer.

        Args:
            context: as a `Request`'s question.
            options: tokenised alone, without special or end tokens.
            experts: as a `Request`'s; None: all.

        Raises:
            WhispersError: anything that is refused, before any work.
        """
        events: deque[Event] = deque()
        task = self._intake.task(Request(context, options, experts), events.append, score=True)
        return _Stream(self._scheduler, task, events).result()

    def score_many(self, requests: Iterable[Request], ahead: int = 8) -> Iterator[ScoreResult]:
        """Scores of many requests, in their order. Several run at once, so that short ones fill the steps together.

        Args:
            requests: each with options; taken as there is room for them, and refused only then.
            ahead: how many run at once.

        Raises:
            WhispersError: a request that is refused. Those before it have been scored.
        """
        running: deque[_Stream] = deque()
        try:
            for request in requests:
                events: deque[Event] = deque()
                task = self._intake.task(request, events.append, score=True)
                running.append(_Stream(self._scheduler, task, events))
                running[-1].start()
                if len(running) >= ahead:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:
            for stream in running:
                stream.close()

    def submit(self, request: Request) -> int:
        """Queues a request and returns its id; `step` brings its events.

        Raises:
            WhispersError: anything in the request that is refused, before any work.
        """
        task = self._intake.task(request, self._inbox.append)
        self._submitted[task.id] = task
        self._scheduler.add(task)
        return task.id

    def step(self) -> list[Event]:
        """Computes one step for all requests and returns the events of the submitted ones, `Failed` among them.

        What is raised in its middle (out of memory, Ctrl-C) fails the requests that it computed: the next step brings
        their `Failed`.
        """
        self._scheduler.step()
        events = list(self._inbox)
        self._inbox.clear()
        for event in events:
            if isinstance(event, Done | Failed):
                self._submitted.pop(event.request_id, None)
        return events

    def abort(self, request_id: int) -> None:
        """Drops a submitted request and its pending events, and gives its pages back; one that is done or unknown is
        left alone."""
        task = self._submitted.pop(request_id, None)
        if task is not None:
            self._scheduler.abort(task)
            # In place: tasks fill this very list.
            self._inbox[:] = [event for event in self._inbox if event.request_id != request_id]

    @property
    def busy(self) -> bool:
        """Whether a step has anything to compute, or events to hand out."""
        return self._scheduler.busy or bool(self._inbox)

    def cache_stats(self) -> dict[str, int]:
        """pages_total, pages_free (kept ones included), pages_kept (full context pages that nobody uses at the moment), pages_pinned,
        pages_context, pages_branch."""
        return self.pool.stats()


class _Stream(Iterator[Event]):
    """A task's events, computed as they are asked for. Unlike a generator, one dropped before its first event ends its task too."""

    def __init__(self, scheduler: Scheduler, task: Task, events: deque[Event]):
        self._scheduler = scheduler
        self._task = task
        self._events = events
        self._started = False
        self._ended = False

    def __next__(self) -> Event:
        if self._ended:
            raise StopIteration
        try:
            self.start()
            while not self._events:
                self._scheduler.step()
            event = self._events.popleft()
            if isinstance(event, Failed):
                raise WhispersError(event.error)
        except BaseException:
            self.close()
            raise
        if isinstance(event, Done | Scored):
            self.close()
        return event

    def start(self) -> None:
        """Queues the task; a second call does nothing."""
        if not self._started:
            self._started = True
            self._scheduler.add(self._task)

    def result(self) -> ScoreResult:
        """Of a task that scores: computes until it is done."""
        for event in self:
            if isinstance(event, Scored):
                return event.result
        raise AssertionError("a score ended without a result")

    def close(self) -> None:
        """Ends the task and gives its pages back; a second call does nothing."""
        self._ended = True
        self._scheduler.abort(self._task)

    def __del__(self) -> None:
        self._scheduler.drop(self._task)


def device_of(name: str) -> torch.device:
    """The device of that name; "auto": cuda where there is one. Raises WhispersError for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise WhispersError(f"device: {name!r}; accepted: auto, cpu, cuda, cuda:N") from error
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
        raise WhispersError(
            f"device: {name!r} is not available here; accepted: auto, cpu{''.join(f', cuda:{index}' for index in range(gpus))}"
        )
    return device


def base_folder(model: str | Path) -> Path:
    """The folder of a base: local, built in, or from the hub."""
    folder = Path(model)
    if folder.is_dir():
        return folder.resolve()
    name = str(model)
    if name in BUILT_IN:
        return pull(name)
    accepted = f"a local folder, a hub id such as org/name, or one of {', '.join(BUILT_IN)}"
    if isinstance(model, Path) or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise WhispersError(f"model: {name!r} is no folder here; accepted: {accepted}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]))
    except Exception as error:  # the hub client raises a dozen types
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WhispersError(f"model: {name!r} is no folder here and could not be had from the hub: {reason}") from error


def _pool_pages(
    config: ModelConfig, dtype: torch.dtype, device: torch.device, tokens: int | None, page_size: int
) -> int:
    if tokens is None:
        per_token = 2 * config.num_layers * config.kv_heads * config.head_dim * dtype.itemsize
        if device.type == "cuda":  # the weights are loaded: most of the rest, with room for a step's own tensors
            tokens = int(torch.cuda.mem_get_info(device)[0] * 0.85) // per_token
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            tokens = min(4 * config.max_position, memory // 4 // per_token)
    return max(tokens, page_size) // page_size
