"""One generation as a client sees it: text deltas of its choices, whatever protocol asked for them.

The cluster pushes tokens in from its callbacks; the client's task takes everything that is queued in one go
(``next_batch``), which is what makes one socket write of many tokens. Who can write without waiting is given them
without its task, at the end of the event loop's turn (``relay``): a stream then costs a call and a write per turn. No
task and no timer per request: the sweep calls ``on_sweep``.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from services.frontend.cluster import Cluster
from services.frontend.detokenizer import detokenizer
from services.frontend.journey import Journey
from services.frontend.line import Line
from services.frontend.lockstep import Lockstep
from services.frontend.order import Consumer, Order, Outcome, Positions
from services.frontend.parsers.output import Call, NewParser, Parsed
from services.frontend.served_model import ServedModel
from services.frontend.stop_strings import StopStrings
from tandem import errors
from tandem.core.blocks import root_hash, token_bytes
from tandem.core.types import FinishReason, SamplingParams
from tandem.telemetry.tracing import Trace

if TYPE_CHECKING:
    from services.frontend.tracing import RequestTraces

#: Tokens that may wait for a slow reader before its request is given up.
MAX_QUEUED_TOKENS = 8_192


#: From a choice and the texts of tokens; None: there can be none.
NewLine = Callable[[int, Sequence[str | None]], Line | None]


def _no_line(choice: int, texts: Sequence[str | None]) -> Line | None:
    return None


class GenerationRequest(Struct, frozen=True, kw_only=True):
    """Protocol-neutral. ``prompts`` are token ids; each is answered ``n`` times, as choices 0, 1, 2, ..."""

    id: str
    model: ServedModel
    prompts: Sequence[Sequence[int]]
    sampling: SamplingParams
    arrival_s: float
    timeout_s: float
    n: int = 1
    stop: Sequence[str] = ()
    skip_special_tokens: bool = True
    #: Takes each choice's text apart.
    new_parser: NewParser | None = None
    #: The client sees tokens before the end.
    streaming: bool = True
    #: As the GenAI conventions call it.
    operation: str = "chat"
    tenant: str = "default"
    request_class: str = ""
    ttft_slo_s: float = 0.0
    cache_salt: str = ""
    traceparent: str = ""
    #: When the prompt's tokens were there.
    tokenised_s: float = 0.0

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens at which the engine ends a choice. They count, and say nothing."""
        ends = frozenset(self.sampling.stop_token_ids)
        return ends if self.sampling.ignore_eos else ends | self.model.eos_ids


class Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class Progress(NamedTuple):
    """How far a generation has come, over all its choices and their attempts."""

    first_token_s: float  # 0 = there is none
    last_news_s: float
    output_tokens: int
    resubmissions: int


class Delta(Struct):  # a quarter of a dataclass's time to make
    """News of one choice: what a token or a run of plain tokens says (may be nothing), or the end."""

    choice: int
    text: str = ""
    #: Of a run: what each of its tokens says.
    pieces: Sequence[str] = ()
    reasoning: str = ""
    calls: Sequence[Call] = ()
    token_ids: Sequence[int] = ()
    positions: Positions | None = None
    prompt_positions: Positions | None = None
    finish: FinishReason | None = None
    #: What stopped it, where it was a stop string or a stop token of the request.
    stopped_by: str | int | None = None


class Generation:
    """Made by ``Generations.begin``; ``start`` it, read it with ``next_batch`` (streaming) or ``collect`` (not), and
    ``close`` it."""

    def __init__(
        self,
        request: GenerationRequest,
        cluster: Cluster,
        on_end: Callable[[Generation], None],
        relay_soon: Callable[[Generation], None],
        departures: Lockstep,
    ) -> None:
        self.request = request
        self.usage = Usage(prompt_tokens=sum(map(len, request.prompts)))
        #: Set as soon as the whole of it has failed.
        self.error: errors.TandemError | None = None
        #: A worker has had a part of it.
        self.opened = False
        #: Its own span; None when nothing is traced.
        self.trace: Trace | None = None
        #: When the whole of the client's request was here.
        self.received_s = 0.0
        #: How its choices ended, as they did.
        self.finish_reasons: list[str] = []
        self._cluster = cluster
        self._on_end = on_end
        #: Together with those that are over in the same turn.
        self.departures = departures
        self._queue: list[Delta] = []
        self._queued_tokens = 0
        self._waiter: asyncio.Future[None] | None = None
        self._relay: Callable[[list[Delta]], bool] | None = None
        self._new_line: NewLine = _no_line
        self._relay_soon = relay_soon
        self._relay_due = False
        self._broken: Exception | None = None
        self._choices: list[_Choice] = []
        self._running = len(request.prompts) * request.n
        self._idle = False
        self._active = False
        self._quiet_since = request.arrival_s

    def start(self) -> None:
        """Gives it to the cluster, unless it has been cancelled before."""
        if self.error is not None:
            return
        request = self.request
        root = root_hash(request.model.name, "", request.cache_salt)
        ends = request.end_tokens
        for index in range(self._running):
            choice = _Choice(self, index, ends)
            self._choices.append(choice)
            order = _order(request, request.prompts[index // request.n], index, root, self.traceparent, ends)
            choice.journey = self._cluster.begin(order, choice)
            if self.error is not None:
                return

    @property
    def done(self) -> bool:
        """Nothing more will be pushed."""
        return self._running == 0 or self.error is not None

    @property
    def over(self) -> bool:
        """Done, and everything was read."""
        return self.done and not self._queue

    @property
    def traceparent(self) -> str:
        """What goes along with it."""
        return self.trace.context.header if self.trace is not None else self.request.traceparent

    @property
    def journeys(self) -> list[Journey]:
        """None once it is over."""
        return [choice.journey for choice in self._choices if choice.journey is not None]

    @property
    def num_choices(self) -> int:
        return len(self.request.prompts) * self.request.n

    def progress(self) -> Progress:
        """Not once it is over."""
        first = last = 0.0
        tokens = resubmissions = 0
        for choice in self._choices:
            journey = choice.journey
            if journey is None:
                continue
            if journey.first_token_s and (not first or journey.first_token_s < first):
                first = journey.first_token_s
            last = max(last, journey.heard_s)
            tokens += len(journey.tokens)
            resubmissions += max(journey.attempt, 0)
        return Progress(first, last, tokens, resubmissions)

    async def wait_opened(self) -> bool:
        """True once a worker has it, False when nothing was heard for long. Raises ``error`` if it failed before."""
        while not self.opened and not self._idle:
            if self.error is not None:
                raise self.error
            await self._news()
        self._idle = False
        return self.opened

    async def next_batch(self) -> list[Delta]:
        """Everything that is queued, at least one delta; nothing after a quiet while. Raises ``error`` after the last.

        Not to be called when ``over``.
        """
        while not self._queue and not self._idle and self._broken is None:
            if self.error is not None:
                raise self.error
            await self._news()
        self._idle = False
        if self._broken is not None:
            raise self._broken
        return self._take()

    def relay(self, take: Callable[[list[Delta]], bool], new_line: NewLine = _no_line) -> None:
        """``take`` is given what is pushed from now on, until it says False: the client takes no more at the moment.
        What comes then, the end, and what ``take`` raises are for ``next_batch``. Where the client has all so far,
        plain tokens go by a ``new_line``, if there is one."""
        if self.done:
            return  # and nothing is to hold on to it
        self._relay = take
        self._new_line = new_line
        if not self._queue:
            self._open_lines()

    def _open_lines(self) -> None:
        for choice in self._choices:
            choice.open_line(self._new_line)

    def stop_relay(self) -> None:
        self._relay = None
        for choice in self._choices:
            choice.close_line()
        self._wake()

    def relay_now(self) -> None:
        self._relay_due = False
        relay = self._relay
        if relay is None or self.done or not self._queue:
            return
        try:
            if relay(self._take()):
                self._open_lines()
                return
        except Exception as error:
            self._broken = error
        self.stop_relay()

    def _take(self) -> list[Delta]:
        batch, self._queue = self._queue, []
        self._queued_tokens = 0
        return batch

    async def collect(self) -> list[Delta]:
        """All deltas, when it is done. Raises ``error`` if it failed."""
        while not self.done:
            await self._news()
        if self.error is not None:
            raise self.error
        return self._queue

    def cancel(self) -> None:
        """The client has gone: ends all choices wherever they are. No-op when it is done."""
        if not self.done:
            self.fail(errors.Cancelled("cancelled by the client"))

    def close(self) -> None:
        """Once, by its reader, who has said all of it or will say no more: ends what has not ended."""
        self.cancel()
        self.departures.leave()

    def on_sweep(self, now: float, idle_s: float) -> None:
        """Wakes the reader when nothing was pushed for ``idle_s``."""
        if self._active:
            self._active = False
            self._quiet_since = now
        elif now - self._quiet_since >= idle_s and self.request.streaming:
            said_s = max((journey.heard_s for journey in self.journeys if journey.line is not None), default=0.0)
            if now - said_s < idle_s:  # by a line
                self._quiet_since = said_s
                return
            self._quiet_since = now
            self._idle = True
            self._wake()

    # -- from the choices ------------------------------------------------------------------------------------------

    def open(self) -> None:
        self.opened = True
        if self.request.streaming:
            self._wake()

    def push(self, delta: Delta) -> None:
        self._queue.append(delta)
        if not self.request.streaming:
            return
        self._active = True
        self._queued_tokens += len(delta.token_ids)
        if self._queued_tokens > MAX_QUEUED_TOKENS:
            self._queue.clear()
            self.fail(errors.Cancelled("the client reads too slowly"))
        elif self._relay is None:
            self._wake()
        elif not self._relay_due:
            self._relay_due = True
            self._relay_soon(self)

    def forget(self, choice: int) -> None:
        """The choice starts again from scratch. Only where nothing was read yet."""
        self._queue = [delta for delta in self._queue if delta.choice != choice]

    def choice_ended(self, choice: int, outcome: Outcome, output_tokens: int) -> None:
        self._running -= 1
        self.finish_reasons.append(outcome.reason.value)
        self.usage.completion_tokens += output_tokens
        if choice % self.request.n == 0:  # a prompt counts once, however many answers it gets
            self.usage.cached_tokens += outcome.cached_tokens
        if self._running == 0:
            self._on_end(self)
            self._wake()

    def fail(self, error: errors.TandemError) -> None:
        """One choice that failed fails all: half an answer is none."""
        if self.error is not None:
            return
        self.error = error
        for choice in self._choices:
            if choice.journey is not None:
                self._cluster.cancel(choice.journey)
        self._on_end(self)
        self._wake()

    def stop(self, journey: Journey) -> None:
        self._cluster.stop(journey)

    def release(self) -> None:
        """It is over: its parts let go of each other. Else each request would be left to the garbage collector, and
        the next would be made in memory that no cache holds."""
        for choice in self._choices:
            choice.journey = None
        self._choices.clear()
        self._relay, self._new_line = None, _no_line

    # -- inside ----------------------------------------------------------------------------------------------------

    async def _news(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Generations:
    """All that are running in this process."""

    def __init__(self, cluster: Cluster, *, idle_s: float = 10.0, traces: RequestTraces | None = None) -> None:
        self._cluster = cluster
        self._idle_s = idle_s
        self._traces = traces
        self._running: set[Generation] = set()
        self._to_relay: list[Generation] = []
        #: Those that are over, until their readers have closed them.
        self.departures = Lockstep()
        self._refusal: errors.TandemError | None = None
        self._swept_s = 0.0
        #: Called with each, once, when it is over.
        self.on_end: Callable[[Generation], None] = lambda generation: None
        cluster.on_sweep = self._on_sweep

    def __len__(self) -> int:
        return len(self._running)

    def begin(self, request: GenerationRequest, *, received_s: float = 0.0) -> Generation:
        """One that is yet to be started. Raises what was given to ``refuse``."""
        if self._refusal is not None:
            raise self._refusal
        generation = Generation(request, self._cluster, self._ended, self._relay_soon, self.departures)
        if self._traces is not None:
            generation.trace = self._traces.begin(request.traceparent)
            generation.received_s = received_s
        self._running.add(generation)
        return generation

    def refuse(self, error: errors.TandemError) -> None:
        """None begins from now on."""
        self._refusal = error

    def open_by_model(self) -> dict[str, int]:
        return Counter(generation.request.model.name for generation in self._running)

    def _ended(self, generation: Generation) -> None:
        if generation in self._running:
            self._running.remove(generation)
            self.departures.enter()
            self.on_end(generation)
            if self._traces is not None:
                self._traces.ended(generation)
            generation.release()

    def _relay_soon(self, generation: Generation) -> None:
        """One call for all that this turn brings."""
        if not self._to_relay:
            asyncio.get_running_loop().call_soon(self._relay_all)
        self._to_relay.append(generation)

    def _relay_all(self) -> None:
        generations, self._to_relay = self._to_relay, []
        for generation in generations:
            generation.relay_now()

    def _on_sweep(self, now: float) -> None:
        if now - self._swept_s < self._idle_s / 10:
            return  # near enough for who waits ten times as long
        self._swept_s = now
        for generation in list(self._running):
            generation.on_sweep(now, self._idle_s)


class _Choice(Consumer):
    """From a journey's tokens to deltas: detokenised, cut at stop strings."""

    __slots__ = ("_detokenizer", "_ends", "_generation", "_index", "_parser", "_plain", "_stops", "_tokens",
                 "journey")  # fmt: skip

    def __init__(self, generation: Generation, index: int, ends: frozenset[int]) -> None:
        self.journey: Journey | None = None
        self._generation = generation
        self._index = index
        self._ends = ends
        self._reset()

    def _reset(self) -> None:
        request = self._generation.request
        self._parser = request.new_parser() if request.new_parser is not None else None
        self._detokenizer = detokenizer(
            request.model.tokenizer,
            skip_special_tokens=request.skip_special_tokens,
            but=self._parser.markers if self._parser is not None else (),
        )
        self._stops = StopStrings(request.stop) if request.stop else None
        #: Each token says its text and that is all.
        self._plain = self._parser is None and self._stops is None
        self._tokens = 0  # where they are not plain: up to the stop string

    def opened(self) -> None:
        self._generation.open()

    def open_line(self, new_line: NewLine) -> None:
        journey = self.journey
        if journey is None or journey.line is not None or not (self._plain and journey.flows):
            return
        texts = self._detokenizer.texts
        # The engine's end of text is none; a stop token may be.
        if texts and all(end >= len(texts) or texts[end] is None for end in self._ends):
            line = new_line(self._index, texts)
            if line is not None:
                journey.open_line(line)

    def close_line(self) -> None:
        if self.journey is not None:
            self.journey.line = None

    def tokens(self, tokens: Sequence[int], positions: Positions | None, prompt_positions: Positions | None) -> None:
        generation = self._generation
        if self._plain and positions is None and prompt_positions is None and self._ends.isdisjoint(tokens):
            pieces = self._detokenizer.push_all(tokens)
            if len(pieces) == 1:
                generation.push(Delta(self._index, pieces[0], token_ids=tokens))
            else:
                generation.push(Delta(self._index, "".join(pieces), pieces, token_ids=tokens))
            return
        for i, token in enumerate(tokens):
            if self._stops is not None and self._stops.found is not None:
                return
            self._tokens += 1
            text = "" if token in self._ends else self._detokenizer.push(token)
            if self._stops is not None:
                text = self._cut(text)
            delta = Delta(
                self._index,
                text,
                token_ids=(token,),
                positions=positions[i : i + 1] if positions is not None else None,
                prompt_positions=prompt_positions if i == 0 else None,
            )
            if self._parser is not None:
                _say(delta, self._parser.push(text))
            generation.push(delta)

    def _cut(self, text: str) -> str:
        assert self._stops is not None
        if self._tokens <= self._generation.request.sampling.min_tokens:
            return text  # a stop string counts only after the tokens that must be there
        text = self._stops.push(text)
        if self._stops.found is not None and self.journey is not None:
            self._generation.stop(self.journey)
        return text

    def restarted(self) -> None:
        self._generation.forget(self._index)
        self._reset()

    def ended(self, outcome: Outcome) -> None:
        generation = self._generation
        if outcome.error is not None:
            generation.fail(outcome.error)
            return
        self._flush()
        stop = self._stops.found if self._stops is not None else None
        reason = outcome.reason if stop is None else FinishReason.STOP
        stopped_by = outcome.stop_token_id if stop is None else stop
        generation.push(Delta(self._index, finish=reason, stopped_by=stopped_by))
        generation.choice_ended(self._index, outcome, outcome.output_tokens if self._plain else self._tokens)

    def _flush(self) -> None:
        """Gives out what was held back in case more came."""
        rest = self._detokenizer.finish()
        if self._plain and not rest:
            return
        if self._stops is not None:
            rest = self._stops.push(rest)
            if self._stops.found is None:
                rest += self._stops.finish()
        delta = Delta(self._index, rest)
        if self._parser is not None:
            _say(delta, self._parser.push(rest) + self._parser.finish())
        if delta.text or delta.reasoning or delta.calls:
            self._generation.push(delta)


def _say(delta: Delta, parsed: Parsed) -> None:
    delta.text, delta.reasoning, delta.calls = parsed.text, parsed.reasoning, parsed.calls


def _order(
    request: GenerationRequest,
    prompt: Sequence[int],
    index: int,
    root: int,
    traceparent: str,
    ends: frozenset[int],
) -> Order:
    sampling = request.sampling
    nth = index % request.n
    if nth and sampling.seed is not None:
        # Each choice draws for itself; with a seed, each time the same way.
        sampling = replace(sampling, seed=(sampling.seed + nth) % 2**63)
    return Order(
        id=request.id,
        model=request.model.name,
        prompt=token_bytes(prompt),
        sampling=sampling,
        arrival_s=request.arrival_s,
        deadline_s=request.arrival_s + request.timeout_s,
        choice=index,
        tenant=request.tenant,
        request_class=request.request_class,
        ttft_slo_s=request.ttft_slo_s,
        cache_salt=request.cache_salt,
        block_size=request.model.block_size,
        hash_root=root,
        traceparent=traceparent,
        restartable=not request.streaming,
        end_tokens=ends,
    )
