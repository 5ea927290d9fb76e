"""Continuous batching over paged KV blocks, one step at a time.

A step, after vLLM's scheduler: every decoding sequence gets one token; then the prefills under way, in their order, and
then waiting requests, by (priority, arrival), share what is left of ``max_batched_tokens`` (chunked prefill). A waiting
request takes its cached prefix first; the last token of a prompt is always computed. When the blocks run out, the
running sequence of the lowest rank is preempted: its blocks go, and it is computed again later. While anything was
preempted in a step, nothing is admitted.

A request whose KV comes from another engine takes its blocks and leaves for PULLING; the caller moves the bytes and
calls ``pull_done``. A request that produces a handoff ends with its prompt; its blocks stay held until
``release_handoff`` or its lease's end.

The state changes at the call of ``step``; what it returns holds ``duration_s`` later. The caller owns the clock and
must not call ``step`` again before that.
"""

from __future__ import annotations

from heapq import heappop, heappush

from tandem.core.profiles import Profile
from tandem.core.types import FinishReason, StepTiming
from tandem.enginemodel.block_pool import BlockPool, Stored, mix_taint
from tandem.enginemodel.profile import context_sum, step_s
from tandem.enginemodel.sequence import Handoff, ModelConfig, Output, Phase, Pull, Sequence, StepResult

_UNBOUNDED = 1 << 60


class EngineModel:
    def __init__(self, config: ModelConfig, profile: Profile) -> None:
        self.config = config
        self.profile = profile
        self.pool = BlockPool(config.num_blocks)
        self.sequences: dict[str, Sequence] = {}  # all that are not done
        self.decoding: list[Sequence] = []
        self.prefilling: list[Sequence] = []
        self.handoffs: dict[str, Handoff] = {}
        self.preemptions = 0
        self.decode_kv_tokens = 0  # sum of the decoding sequences' lengths
        # Heaps by rank; entries of aborted sequences are stale.
        self._waiting: list[tuple[int, int, Sequence]] = []
        self._ready: list[tuple[int, int, Sequence]] = []  # KV pulled, blocks in hand
        self._dropped: dict[str, Sequence] = {}  # aborted while a pull still writes their blocks
        self._blocked = False  # the head of the queue did not fit, and nothing was freed since
        self._arrivals = 0
        # Of the decoding sequences, which all go on together, so that a step need not look at each of them:
        self._due_in: int | None = None  # tokens until the first reaches its ``decode_target``; None = to be found
        self._spare = 0  # tokens, at least, that every one of them has room for in its blocks; negative = look

    # -- requests ------------------------------------------------------------------------------------------------

    def submit(self, sequence: Sequence) -> None:
        """ValueError if the prompt leaves no room for one token."""
        prompt = sequence.content.prompt_tokens
        if not 1 <= prompt < self.config.context_limit:
            raise ValueError(f"prompt of {prompt} tokens in a context of {self.config.context_limit}")
        if sequence.request_id in self.sequences:
            raise ValueError(f"request {sequence.request_id} is here already")
        self._arrivals += 1
        sequence.arrival = self._arrivals
        self._blocked = False
        sequence.length = prompt
        self.sequences[sequence.request_id] = sequence
        self._enqueue(sequence)

    def abort(self, request_id: str) -> bool:
        """Drop it and free its blocks, except those that a pull still writes. False if there is no such request."""
        sequence = self.sequences.pop(request_id, None)
        if sequence is None:
            return False
        pulling = sequence.phase is Phase.PULLING
        self._leave_batch(sequence)
        sequence.phase = Phase.DONE
        if pulling:
            self._dropped[request_id] = sequence
        else:
            self._free(sequence)
        return True

    def pull_done(self, request_id: str, contents: list[int] | None) -> None:
        """A pull ended: with what the blocks now hold (see ``expected_contents``), or with a failure (None)."""
        if (dropped := self._dropped.pop(request_id, None)) is not None:
            self._free(dropped)
            return
        sequence = self.sequences[request_id]
        if contents is not None:
            first = sequence.hit_blocks
            for i, (got, wanted) in enumerate(zip(contents, self.expected_contents(sequence, first), strict=True)):
                self.pool.content[sequence.blocks[first + i]] = got
                sequence.taint = mix_taint(sequence.taint, got, wanted)
            sequence.computed = sequence.length - 1
            self._cache_blocks(sequence, sequence.length, pulled=True)
        self._pulled(sequence)

    def expected_contents(self, sequence: Sequence, first: int) -> list[int]:
        """What the blocks of the prompt from index ``first`` on hold if their KV is right."""
        full = sequence.content.prompt_tokens // self.config.block_size
        contents = list(sequence.content.hashes[first:full])
        if sequence.content.prompt_tokens % self.config.block_size:
            contents.append(sequence.content.tail_hash())
        return contents

    # -- handoffs ------------------------------------------------------------------------------------------------

    def claim_handoff(self, handoff_id: str, now: float) -> float | None:
        """Seconds left on its lease; None = gone."""
        self.expire_handoffs(now)
        handoff = self.handoffs.get(handoff_id)
        return None if handoff is None else handoff.expires_at - now

    def release_handoff(self, handoff_id: str) -> bool:
        handoff = self.handoffs.pop(handoff_id, None)
        if handoff is not None:
            self._blocked = False
            self.pool.release(handoff.blocks)
        return handoff is not None

    def expire_handoffs(self, now: float) -> None:
        while self.handoffs:
            oldest = next(iter(self.handoffs.values()))  # one lease length, so the first made ends first
            if oldest.expires_at > now:
                break
            self.release_handoff(oldest.handoff_id)

    def clear_cache(self) -> None:
        """Forget the prefix cache. Who runs now keeps his blocks and caches no more, so that it stays prefix-closed."""
        self.pool.clear_cache()
        for sequence in self.sequences.values():
            if sequence.blocks:
                sequence.cached_upto = _UNBOUNDED

    # -- what it has to do ---------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step could do something; pulls under way are others' work."""
        return bool(self.decoding or self.prefilling or self._head())

    def next_expiry(self) -> float | None:
        """When the oldest handoff's lease ends."""
        return next((handoff.expires_at for handoff in self.handoffs.values()), None)

    @property
    def num_running(self) -> int:
        return len(self.decoding) + len(self.prefilling)

    def waiting(self) -> list[Sequence]:
        """Not running: queued, or waiting for a pull."""
        return [s for s in self.sequences.values() if s.phase in (Phase.WAITING, Phase.PULLING)]

    def dropped(self) -> list[Sequence]:
        """Aborted, but a pull still writes their blocks."""
        return list(self._dropped.values())

    def pending_prefill(self) -> tuple[int, int]:
        """(tokens, sum of their contexts) still to be computed before first tokens; cached prefixes not looked up."""
        tokens = context = 0
        if len(self.decoding) == len(self.sequences):
            return 0, 0
        for sequence in self.sequences.values():
            if sequence.phase is Phase.PREFILL or (sequence.phase is Phase.WAITING and not sequence.remote):
                left = sequence.length - sequence.computed
                tokens += left
                context += context_sum(sequence.computed, left)
        return tokens, context

    # -- the step ------------------------------------------------------------------------------------------------

    def step(self, now: float) -> StepResult:
        """Do one step that begins at ``now``. ``steps`` is 0 in the result if nothing could run."""
        self.expire_handoffs(now)
        result = StepResult()
        preemptions = self.preemptions
        self._make_room_for_decodes()
        chunks = self._grow_prefills(self.config.max_batched_tokens - len(self.decoding))
        if self.preemptions == preemptions:
            self._admit(chunks, result)
        else:
            chunks = [(s, count) for s, count in chunks if s.phase is Phase.PREFILL]
        decodes = list(self.decoding)
        prefill_tokens = sum(count for _, count in chunks)
        prefill_context = sum(context_sum(s.computed, count) for s, count in chunks)
        kv_tokens = self.decode_kv_tokens
        if decodes or chunks:
            duration = step_s(self.profile, prefill_tokens, prefill_context, len(decodes), kv_tokens)
            result.duration_s, result.steps = duration, 1
            result.timing = StepTiming(duration, prefill_tokens, prefill_context, len(decodes), kv_tokens)
        end = now + result.duration_s
        self._advance_decodes(decodes, 1, end, result)
        for sequence, count in chunks:
            self._advance_prefill(sequence, count, end, result)
        result.events = self.pool.take_events()
        return result

    def quiet_steps(self) -> int:
        """How many steps in a row are sure to be plain decodes whose outcomes nobody need see; 0 = call ``step``."""
        if self.prefilling or not self.decoding or not (self._blocked or self._head() is None):
            return 0
        if self._due_in is None:
            self._due_in = min(sequence.decode_target - sequence.length for sequence in self.decoding)
        steps = self._due_in
        while steps > 1 and self._growth_within(steps) > self.pool.num_free:
            steps //= 2
        return steps if steps > 1 else 0

    def evicts(self, steps: int) -> bool:
        """Whether so many quiet steps take blocks out of the prefix cache."""
        return steps - 1 > self._spare and self.pool.would_evict(sum(self._growth(steps)))

    def quiet_s(self, steps: int) -> float:
        """Duration of so many quiet steps."""
        per_step = step_s(self.profile, 0, 0, len(self.decoding), self.decode_kv_tokens)
        return steps * per_step + self.profile.d2 * len(self.decoding) * (steps * (steps - 1) // 2)

    def plain_steps(self, most: int) -> int:
        """How many steps in a row, at most ``most``, are sure to be plain decodes with an outcome each, so that
        ``run_quiet`` may do them: nobody joins, there are blocks, and nobody reaches a limit before the last. A token
        that stops its sequence may come in any of them. 0 = call ``step``."""
        if self.prefilling or not self.decoding or not (self._blocked or self._head() is None):
            return 0
        limit = self.config.context_limit
        for sequence in self.decoding:
            left = 0 if sequence.produce_handoff else sequence.max_tokens - sequence.output_tokens
            most = min(most, left, limit - sequence.length)
        while most > 1 and self._growth_within(most) > self.pool.num_free:
            most //= 2
        return most if most > 1 else 0

    def run_quiet(self, steps: int, now: float) -> StepResult:
        """Do ``steps`` (at most ``quiet_steps()`` or ``plain_steps()``) steps from ``now`` on, with the tokens and ends
        of so many calls of ``step``; all tokens of a sequence are one output. Blocks for all of them are taken first,
        and whoever waits joins after the last."""
        batch, kv_tokens = len(self.decoding), self.decode_kv_tokens
        result = StepResult(duration_s=self.quiet_s(steps), steps=steps)
        mean_kv = kv_tokens + batch * (steps - 1) // 2
        result.timing = StepTiming(result.duration_s / steps, 0, 0, batch, mean_kv)
        if steps - 1 > self._spare:
            for sequence, missing in zip(self.decoding, self._growth(steps), strict=True):
                if missing:
                    sequence.blocks += self.pool.allocate(missing)
            self._find_spare()
        self._advance_decodes(list(self.decoding), steps, now + result.duration_s, result)
        result.events = self.pool.take_events()
        return result

    def _growth(self, steps: int) -> list[int]:
        """Blocks that each decoding sequence needs beyond its own for so many steps."""
        size = self.config.block_size
        return [max(0, -(-(s.length + steps - 1) // size) - len(s.blocks)) for s in self.decoding]

    def _growth_within(self, steps: int) -> int:
        """Sum of ``_growth``, or 0 where that is sure to fit into what is free."""
        most = len(self.decoding) * (1 + self._blocks_for(steps))
        return 0 if steps - 1 <= self._spare or most <= self.pool.num_free else sum(self._growth(steps))

    def _find_spare(self) -> None:
        size = self.config.block_size
        self._spare = min((len(s.blocks) * size - s.length for s in self.decoding), default=0)

    def _make_room_for_decodes(self) -> None:
        """A block for each decode that begins one; preempts where there is none."""
        if self._spare >= 0:
            return
        size = self.config.block_size
        for sequence in [s for s in self.decoding if s.length > len(s.blocks) * size]:
            if sequence.phase is Phase.DECODE and self._room_for(sequence, 1):
                sequence.blocks += self.pool.allocate(1)
        self._find_spare()

    def _grow_prefills(self, budget: int) -> list[tuple[Sequence, int]]:
        """(sequence, tokens) that the prefills under way compute in this step."""
        chunks = []
        for sequence in list(self.prefilling):
            count = min(sequence.length - sequence.computed, budget)
            if count <= 0 or sequence.phase is not Phase.PREFILL:
                continue
            missing = self._blocks_for(sequence.computed + count) - len(sequence.blocks)
            if missing > 0:
                if not self._room_for(sequence, missing):
                    continue
                sequence.blocks += self.pool.allocate(missing)
            chunks.append((sequence, count))
            budget -= count
        return chunks

    def _admit(self, chunks: list[tuple[Sequence, int]], result: StepResult) -> None:
        """Start waiting requests while tokens, sequences and blocks last; adds to ``chunks``."""
        budget = self.config.max_batched_tokens - len(self.decoding) - sum(count for _, count in chunks)
        while budget > 0 and (sequence := self._head()) is not None:
            full = self.num_running >= self.config.max_num_seqs
            if full or (not sequence.blocks and not self._take_prefix(sequence, budget)):
                self._blocked = True
                break
            self._pop_head()
            if sequence.remote:
                self._start_pull(sequence, result)
                continue
            left = sequence.length - sequence.computed
            count = min(left, budget)
            if left == 1:
                self._start_decode(sequence)
            else:
                sequence.phase = Phase.PREFILL
                self.prefilling.append(sequence)
                chunks.append((sequence, count))
            budget -= count

    def _take_prefix(self, sequence: Sequence, budget: int) -> bool:
        """Take cached blocks, and new ones for what runs now (all of the prompt for a pull). False: no room."""
        size, pool = self.config.block_size, self.pool
        # A pull brings the last token's KV too (which is computed again); a full hit need not.
        limit = (sequence.length if sequence.remote else sequence.length - 1) // size
        hits = pool.match(sequence.content.hashes, limit)
        computed = len(hits) * size
        upto = sequence.length if sequence.remote else min(sequence.length, computed + budget)
        missing = self._blocks_for(upto) - len(hits)
        if missing > pool.num_free - pool.num_idle(hits):
            return False
        pool.take(hits)
        sequence.taint ^= pool.taint(hits)
        sequence.blocks = hits + pool.allocate(missing)
        sequence.computed = min(computed, sequence.length - 1)
        sequence.hit_blocks = sequence.cached_upto = len(hits)
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.computed
        return True

    def _start_pull(self, sequence: Sequence, result: StepResult) -> None:
        missing = len(sequence.blocks) - sequence.hit_blocks
        if missing:
            sequence.phase = Phase.PULLING
            result.pulls.append(Pull(sequence.request_id, sequence.hit_blocks, missing))
        else:
            result.released.append(sequence.request_id)
            self._pulled(sequence)

    def _pulled(self, sequence: Sequence) -> None:
        """It holds all its blocks: it goes before those that still need some, or they could block each other."""
        sequence.remote = False
        sequence.phase = Phase.WAITING
        self._blocked = False
        heappush(self._ready, (*sequence.rank, sequence))

    def _start_decode(self, sequence: Sequence) -> None:
        sequence.phase = Phase.DECODE
        self.decoding.append(sequence)
        self.decode_kv_tokens += sequence.length
        # One less than it has: its first token may come with the step that begins its decoding.
        self._spare = min(self._spare, len(sequence.blocks) * self.config.block_size - sequence.length - 1)
        self._set_target(sequence)

    def _set_target(self, sequence: Sequence) -> None:
        self._due_in = None
        if not sequence.content.silent or sequence.output_tokens == 0:
            sequence.decode_target = 0
            return
        size = self.config.block_size
        finish = min(sequence.content.prompt_tokens + sequence.max_tokens, self.config.context_limit)
        cache_next = (sequence.cached_upto + 1) * size + 1 if self._more_to_cache(sequence) else _UNBOUNDED
        sequence.decode_target = min(finish, cache_next)

    def _more_to_cache(self, sequence: Sequence) -> bool:
        return not sequence.content.silent or sequence.cached_upto < len(sequence.content.hashes)

    def _advance_decodes(self, decodes: list[Sequence], steps: int, end: float, result: StepResult) -> None:
        """Each writes the KV of its last token and draws the next, ``steps`` times."""
        self.decode_kv_tokens += len(decodes) * steps
        self._spare -= steps
        for sequence in decodes:
            sequence.length += steps
        if self._due_in is not None:
            self._due_in -= steps
            if self._due_in > 0:
                return
        for sequence in [s for s in decodes if s.length >= s.decode_target]:
            count = 1 if sequence.content.silent else steps
            sequence.length -= count
            self._draw(sequence, count, end, result)

    def _advance_prefill(self, sequence: Sequence, count: int, end: float, result: StepResult) -> None:
        sequence.computed += count
        if sequence.computed < sequence.length:
            self._cache_blocks(sequence, sequence.computed)
            return
        self.prefilling.remove(sequence)
        self._start_decode(sequence)
        self.decode_kv_tokens += 1
        self._draw(sequence, 1, end, result)

    def _draw(self, sequence: Sequence, count: int, end: float, result: StepResult) -> None:
        """Its KV is written up to ``length``; ``count`` more tokens come (``decode_kv_tokens`` counts them already)."""
        self._cache_blocks(sequence, sequence.length)
        if sequence.produce_handoff:
            self._produce(sequence, end, result)
            return
        content = sequence.content
        draw = content.draw(sequence.taint, count)
        if count > 1:
            self.decode_kv_tokens -= count - len(draw.tokens)
            count = len(draw.tokens)
            self._cache_blocks(sequence, sequence.length + count - 1)
        sequence.length += count
        finish = None
        if draw.stop:
            finish = FinishReason.STOP
        elif sequence.output_tokens >= sequence.max_tokens or sequence.length >= self.config.context_limit:
            finish = FinishReason.LENGTH
        if finish is not None:
            self._finish(sequence)
            self._free(sequence)
        else:
            self._set_target(sequence)
        if finish is not None or not content.silent or sequence.output_tokens == 1:
            result.outputs.append(Output(sequence, draw.tokens, finish, draw.stop_token_id))

    def _produce(self, sequence: Sequence, end: float, result: StepResult) -> None:
        size, prompt = self.config.block_size, sequence.content.prompt_tokens
        if prompt % size:
            self.pool.content[sequence.blocks[-1]] = sequence.content.tail_hash() ^ sequence.taint
        self.decode_kv_tokens -= 1
        self._finish(sequence)
        handoff = Handoff(sequence.request_id, prompt, tuple(sequence.blocks), end + self.config.lease_s)
        self.handoffs[handoff.handoff_id] = handoff
        sequence.blocks = []
        result.outputs.append(Output(sequence, finish=FinishReason.LENGTH, handoff=handoff))

    # -- bookkeeping ---------------------------------------------------------------------------------------------

    def _head(self) -> Sequence | None:
        """Who is next to be admitted."""
        for queue in (self._ready, self._waiting):
            while queue:
                sequence = queue[0][2]
                if sequence.phase is Phase.WAITING:
                    return sequence
                heappop(queue)
        return None

    def _pop_head(self) -> None:
        heappop(self._ready or self._waiting)

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.phase = Phase.WAITING
        heappush(self._waiting, (*sequence.rank, sequence))

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def _room_for(self, sequence: Sequence, count: int) -> bool:
        """Preempt running sequences, the lowest rank first, until ``count`` blocks are free. False: it went itself."""
        while self.pool.num_free < count:
            victim = max((*self.decoding, *self.prefilling), key=lambda s: s.rank)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        sequence.preemptions += 1
        self._leave_batch(sequence)
        self._free(sequence)
        sequence.computed = sequence.cached_upto = sequence.hit_blocks = sequence.taint = 0
        self._enqueue(sequence)

    def _leave_batch(self, sequence: Sequence) -> None:
        self._blocked = False
        if sequence.phase is Phase.DECODE:
            self._due_in = None
            self.decoding.remove(sequence)
            self.decode_kv_tokens -= sequence.length
        elif sequence.phase is Phase.PREFILL:
            self.prefilling.remove(sequence)

    def _finish(self, sequence: Sequence) -> None:
        self._leave_batch(sequence)
        sequence.phase = Phase.DONE
        del self.sequences[sequence.request_id]

    def _free(self, sequence: Sequence) -> None:
        self._blocked = False
        self.pool.release(sequence.blocks)
        sequence.blocks = []

    def _cache_blocks(self, sequence: Sequence, written: int, pulled: bool = False) -> None:
        """Enter the full blocks among the first ``written`` tokens into the prefix cache."""
        hashes = sequence.content.hashes
        first, last = sequence.cached_upto, min(written // self.config.block_size, len(hashes))
        if first >= last:
            return
        pool = self.pool
        new = first
        for i in range(first, last):
            if new == i and pool.is_cached(hashes[i]):
                new += 1
            block = sequence.blocks[i]
            content = pool.content[block] if pulled else hashes[i] ^ sequence.taint
            sequence.blocks[i] = pool.cache(block, hashes[i], content)
        sequence.cached_upto = last
        if new < last:
            content_ = sequence.content
            parent = hashes[new - 1] if new else None
            tokens = content_.block_tokens(new, last)
            pool.events.append(Stored(tuple(hashes[new:last]), parent, tokens, content_.lora, content_.cache_salt))
