"""Continuous batching over pipeline streams: two calls a step, `schedule(stream)` and `commit(batch, tokens)`.

Rules: running decodes first, then the prefill that still fits; a sequence is in at most one
stream and one micro-batch; blocks are shared only from commit on; abort and preemption of a sequence in flight only
mark it, and are carried out at that commit; a stream that finds no block sits out; a victim is never older
or of higher priority than the requester; a step that was lost twice in a row runs a third time with nothing beside it,
so that it is known whose fault a third loss is.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from operator import attrgetter
from typing import Protocol

from afd.kv.block_pool import BlockPool
from afd.kv.windowed_blocks import WindowedBlocks, kept
from afd.sched.latency import StepLoad, attended
from afd.sched.sequence import BatchItem, MicroBatch, Progress, Sequence, SequenceState
from afd.types import FinishReason

SUSPECT = 2  # losses in a row after which a sequence's next step runs alone
MAX_PAUSES = 8  # steps of a stream in a row whose decodes leave no room for prefill; the next one prefills a little

SERVICE_ORDER = attrgetter("priority", "arrival")  # `Sequence.rank_key`, at the speed of C: every step sorts by it


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Token and sequence limits of one worker; see `AttentionConfig` for their meaning.

    min_chunk_tokens: prefill of a step after MAX_PAUSES without any, and of each prompt that waits behind the oldest.

    first_stream: which of equally loaded streams gets a sequence first, modulo their number: workers that begin at
    different ones make gangs of even size where their sequences do not divide by the streams.
    """

    max_step_tokens: int = 256
    min_chunk_tokens: int = 8
    max_num_seqs: int = 256
    max_context: int = 2048
    num_streams: int = 2
    first_stream: int = 0


class PrefillPace(Protocol):
    """How much prefill the running decodes can bear."""

    def prefill_tokens(self, streams: Seq[StepLoad], stream: int, target_s: float, start: int, limit: int) -> int:
        """Tokens from position `start` on, at most `limit`, that `stream` can add to its load so that a cycle of
        `streams` keeps to `target_s`."""


class Scheduler:
    """Owns the worker's sequences and their blocks. Not thread safe: the worker's main thread calls it.

    windowed: blocks of sliding-window layers; None = the model has none, or they keep everything in `pool`'s blocks.
    pace: limits prefill beside running decodes, down to nothing for MAX_PAUSES steps; None = no limit.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        pool: BlockPool,
        pace: PrefillPace | None = None,
        windowed: WindowedBlocks | None = None,
    ):
        self.config = config
        self.pool = pool
        self.windowed = windowed
        self._pace = pace
        self._flying: dict[int, StepLoad] = {}  # only with a pace
        self._suspects: set[Sequence] = set()  # running ones that were interrupted SUSPECT times
        self._trial = 0  # step of the suspect that runs alone
        self.trials_open = True  # it may: no other worker tries one of its own
        self._num_pauses: dict[int, int] = {}  # by stream: steps in a row without prefill although prompts wait
        self.num_streams = config.num_streams
        self.max_step_tokens = config.max_step_tokens
        self._waiting: list[Sequence] = []  # ordered by rank_key
        self._running: list[list[Sequence]] = [[] for _ in range(config.num_streams)]
        self._by_id: dict[str, Sequence] = {}
        self._step = 0
        self.num_steps = 0  # that were committed
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0

    # -- requests -----------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return sum(len(seqs) for seqs in self._running)

    @property
    def num_slots(self) -> int:
        """Streams that were ever open: those from `num_streams` on are closed and only finish what is in flight."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        return not self._by_id

    def get(self, req_id: str) -> Sequence | None:
        return self._by_id.get(req_id)

    def full_step(self) -> StepLoad:
        """A decode of every running sequence, also of those whose prompts are not computed yet: what it comes to."""
        return _decode_load([seq for seqs in self._running for seq in seqs])

    def sequences(self) -> list[Sequence]:
        """All live sequences."""
        return list(self._by_id.values())

    def refusal(self, num_prompt: int, max_tokens: int) -> str | None:
        """Why a request of that size can never run here, or None."""
        total = num_prompt + max_tokens
        if total > self.config.max_context:
            return (
                f"prompt ({num_prompt}) plus max_tokens ({max_tokens}) exceeds the context of {self.config.max_context}"
            )
        if self.pool.blocks_for(total) > self.pool.num_blocks:
            return f"{total} tokens do not fit the KV cache of {self.pool.num_blocks * self.pool.block_size} tokens"
        return None

    def add(self, seq: Sequence) -> None:
        """Queue a new sequence; its id must be unknown here."""
        assert seq.req_id not in self._by_id, f"request {seq.req_id} is already here"
        self._by_id[seq.req_id] = seq
        bisect.insort(self._waiting, seq, key=lambda s: s.rank_key)

    def abort(self, req_id: str, reason: FinishReason = FinishReason.ABORT) -> Sequence | None:
        """Forget a request; its blocks return now, or at its micro-batch's commit. None if unknown."""
        seq = self._by_id.pop(req_id, None)
        if seq is None:
            return None
        if seq.in_flight:
            seq.doomed = reason
        else:
            self._leave(seq)
        return seq

    # -- a step -------------------------------------------------------------------------------------------

    def schedule(self, stream: int) -> MicroBatch | None:
        """The next micro-batch of an idle stream, or None when it has nothing to do now."""
        self._admit()
        running = self._running[stream]
        if self._suspects:
            running = self._on_trial(running)
        items: list[BatchItem] = []
        prefills: list[Sequence] = []
        budget = self.config.max_step_tokens
        for seq in sorted(running, key=SERVICE_ORDER):
            assert not seq.in_flight, f"stream {stream} has a micro-batch in flight"
            num_tokens = len(seq.tokens)
            if num_tokens - seq.num_computed != 1:
                prefills.append(seq)
            elif budget and seq.state is SequenceState.RUNNING and self._reserve(seq, num_tokens):
                items.append(BatchItem(seq, num_tokens - 1, 1, True))
                seq.in_flight = True
                budget -= 1
        budget = min(budget, max(self.max_step_tokens - len(items), self.config.min_chunk_tokens))
        if prefills and budget:
            if self._pace is not None:
                budget = self._paced(self._pace, stream, items, prefills, budget)
            self._prefill(prefills, budget, items)
        if not items:
            return None
        self._step += 1
        batch = MicroBatch(stream, self._step, tuple(items))
        if self._suspects and self.trials_open:
            self._trial = self._step
        if self._pace is not None:
            self._flying[stream] = StepLoad.of(batch)
        return batch

    def foresee(self, batch: MicroBatch) -> tuple[BatchItem, ...] | None:
        """What will follow `batch`, which is in flight, if every sequence of it goes on and nobody comes; None where
        something else is to be expected.

        Blocks of the tokens to come are taken now, a step early, but only while everybody's next one is free.
        """
        running = self._running[batch.stream]
        if self._waiting or len(running) != len(batch.items) or self._scarce:
            return None
        if any(not item.samples or _ends(item, self.config.max_context) for item in batch.items):
            return None
        items = [BatchItem(item.seq, item.start + item.num_new, 1, True) for item in batch.items]
        for item in items:
            self._take(item.seq, item.start + 1)
        return tuple(sorted(items, key=lambda item: SERVICE_ORDER(item.seq)))

    def commit(self, batch: MicroBatch, sampled: Mapping[str, int]) -> list[Progress]:
        """Book a computed micro-batch. sampled: token by req_id for the items that sample.

        Returns what the clients must hear, in item order; finished and aborted sequences have left.
        """
        progress: list[Progress] = []
        self.num_steps += 1
        self._flying.pop(batch.stream, None)
        publishes, windowed = self.pool.prefix_cache, self.windowed
        for item in batch.items:
            seq = item.seq
            seq.in_flight = False
            if seq.doomed is not None:
                self._leave(seq)
                continue
            if seq.num_interrupted:
                seq.num_interrupted = 0
                self._suspects.discard(seq)
            seq.num_computed += item.num_new
            if publishes:
                self._publish(seq)
            if windowed is not None:
                windowed.trim(seq.window_blocks, seq.num_computed)
            if item.samples:
                progress.append(self._append(seq, sampled[seq.req_id]))
            if seq.evicted and seq.state is SequenceState.RUNNING:
                self._preempt(seq)
        self._balance(batch.stream)
        return progress

    def fail_stream(self, batch: MicroBatch) -> None:
        """Drop a micro-batch whose computation was lost: nothing is booked, its sequences run it again.

        Each one's `num_interrupted` rises; above SUSPECT only if the micro-batch was alone in the pipeline, so that
        nothing else can have been the cause.
        """
        self._flying.pop(batch.stream, None)
        for item in batch.items:
            seq = item.seq
            seq.in_flight = False
            if seq.doomed is not None:
                self._leave(seq)
                continue
            if seq.num_interrupted < SUSPECT or batch.step == self._trial:
                seq.num_interrupted += 1
            if seq.evicted:
                self._preempt(seq)
            elif seq.num_interrupted >= SUSPECT:
                self._suspects.add(seq)

    def set_num_streams(self, num_streams: int) -> None:
        """Use streams 0..num_streams-1 from now on; sequences of a closed stream move as they commit."""
        while len(self._running) < num_streams:
            self._running.append([])
        self.num_streams = num_streams
        for stream in range(num_streams, len(self._running)):
            self._balance(stream)

    def limit_step(self, max_tokens: int) -> None:
        """Fill micro-batches up with prefill to so many tokens from the next one on. Never more than configured.

        Decodes are not held back: the limit is for what prefill costs other workers.
        """
        self.max_step_tokens = min(max_tokens, self.config.max_step_tokens)

    def check(self) -> None:
        """Raise AssertionError unless blocks and lists are whole. Costs more the more blocks ever were in use."""
        doomed = [s for seqs in self._running for s in seqs if s.doomed is not None]
        live = [*self._by_id.values(), *doomed]
        self.pool.check([s.blocks for s in live])
        if self.windowed is not None:
            self.windowed.pool.check([kept(s.window_blocks) for s in live])
        assert all(s.stream == i for i, seqs in enumerate(self._running) for s in seqs)
        assert len(self._waiting) + self.num_running == len(self._by_id) + len(doomed)
        assert self._suspects == {s for seqs in self._running for s in seqs if s.num_interrupted >= SUSPECT}

    # -- details ------------------------------------------------------------------------------------------

    def _on_trial(self, running: Seq[Sequence]) -> list[Sequence]:
        """The sequences of a stream that may run now: one suspect, once nothing is in flight; those that are none while
        another worker has its turn."""
        if not self.trials_open:
            return [seq for seq in running if seq not in self._suspects]
        if any(seq.in_flight for seqs in self._running for seq in seqs):
            return []
        return sorted((seq for seq in running if seq in self._suspects), key=SERVICE_ORDER)[:1]

    def _prefill(self, prefills: Seq[Sequence], budget: int, items: list[BatchItem]) -> None:
        """Add chunks of at most `budget` tokens together.

        The oldest prompt gets what there is, less a little for the others, of at most half: a short one behind a long
        one need not wait for all of it.
        """
        least = self.config.min_chunk_tokens
        for idx, seq in enumerate(prefills):
            if seq.state is not SequenceState.RUNNING:
                continue  # it became a victim
            reserve = min(budget // 2, least * (len(prefills) - idx - 1))
            take = min(seq.num_pending, budget - reserve)
            if take > 0 and self._reserve(seq, seq.num_computed + take):
                items.append(BatchItem(seq, seq.num_computed, take, take == seq.num_pending))
                seq.in_flight = True
                budget -= take

    def _paced(
        self, pace: PrefillPace, stream: int, decodes: Seq[BatchItem], prefills: Seq[Sequence], budget: int
    ) -> int:
        """Prefill tokens of this step: what the tightest decode anywhere can bear."""
        decoding = [seq for seqs in self._running for seq in _decoding(seqs)]
        target_s = min((seq.tpot_s for seq in decoding if seq.tpot_s), default=0.0)
        if not target_s:
            return budget
        loads = [self._flying.get(idx) or _decode_load(_decoding(seqs)) for idx, seqs in enumerate(self._running)]
        loads[stream] = _decode_load([item.seq for item in decodes])
        allowed = pace.prefill_tokens(loads, stream, target_s, prefills[0].num_computed, budget)
        if allowed:
            self._num_pauses[stream] = 0
            return allowed
        pauses = self._num_pauses.get(stream, 0) + 1 if decodes else MAX_PAUSES + 1  # an empty step is no pause
        self._num_pauses[stream] = pauses % (MAX_PAUSES + 1)
        return min(budget, self.config.min_chunk_tokens) if pauses > MAX_PAUSES else 0

    def _admit(self) -> None:
        """Waiting -> running, in service order, while a place and the blocks of the whole text so far are free."""
        while self._waiting and self.num_running < self.config.max_num_seqs:
            seq = self._waiting[0]
            hashes = self.pool.find(seq.tokens, seq.hashes)
            if self.pool.blocks_for(len(seq.tokens) + 1) - len(hashes) > self.pool.num_free:
                return  # no need to take references on the cached blocks and give them back
            self._match(seq, hashes)
            if self._lacks(seq, len(seq.tokens) + 1, at_once=False):
                self._give_back(seq)
                return
            self._waiting.pop(0)
            seq.num_computed = len(seq.blocks) * self.pool.block_size
            seq.num_cached = min(seq.num_computed, seq.num_prompt)
            self.prefix_queries += seq.num_prompt
            self.prefix_hits += seq.num_cached
            seq.state = SequenceState.RUNNING
            seq.stream = self._lightest()
            self._running[seq.stream].append(seq)
            if seq.num_interrupted >= SUSPECT:
                self._suspects.add(seq)

    def _lightest(self) -> int:
        """Open stream with the fewest sequences, then the fewest context tokens; empty ones in order, since workers
        that have a sequence or two should meet in one gang."""
        num_streams, first = self.num_streams, self.config.first_stream

        def load(i: int) -> tuple[int, int, int]:
            seqs = self._running[i]
            return len(seqs), sum(len(s.tokens) for s in seqs), (i - first) % num_streams if seqs else i

        return min(range(num_streams), key=load)

    def _reserve(self, seq: Sequence, num_tokens: int) -> bool:
        """Blocks for the first `num_tokens` tokens; takes them from a younger or less urgent sequence if it must."""
        if self.windowed is None and num_tokens <= len(seq.blocks) * self.pool.block_size:
            return True
        while self._lacks(seq, num_tokens):
            victim = max((s for seqs in self._running for s in seqs), key=lambda s: s.rank_key)
            if victim is seq:
                self._preempt(seq)
                return False
            if victim.in_flight:
                victim.evicted = True  # its blocks come back at its commit; sit out until then
                return False
            self._preempt(victim)
        self._take(seq, num_tokens)
        return True

    def _take(self, seq: Sequence, num_tokens: int) -> None:
        """Blocks for its first `num_tokens` tokens, which are known to be free."""
        _extend(seq.blocks, self.pool, self.pool.blocks_for(num_tokens) - len(seq.blocks))
        if self.windowed is not None:
            _extend(seq.window_blocks, self.windowed.pool, self.windowed.missing(seq.window_blocks, num_tokens))

    @property
    def _scarce(self) -> bool:
        """Whether some running sequence might find no block for its next token."""
        pools = [self.pool] if self.windowed is None else [self.pool, self.windowed.pool]
        return any(pool.num_free < self.num_running for pool in pools)

    def _lacks(self, seq: Sequence, num_tokens: int, at_once: bool = True) -> bool:
        """True when the blocks of its first `num_tokens` tokens are not free. at_once: all are computed next step."""
        if self.pool.blocks_for(num_tokens) - len(seq.blocks) > self.pool.num_free:
            return True
        if self.windowed is None:
            return False
        missing = self.windowed.missing if at_once else self.windowed.missing_over_time
        return missing(seq.window_blocks, num_tokens) > self.windowed.pool.num_free

    def _match(self, seq: Sequence, hashes: list[bytes]) -> None:
        """Take the longest of these cached blocks that every layer can go on from."""
        if self.windowed is not None:
            hashes = hashes[: self.windowed.usable(hashes)]
            seq.window_blocks = self.windowed.take(hashes)
        seq.blocks, seq.num_published = self.pool.take(hashes), len(hashes)

    def _give_back(self, seq: Sequence) -> None:
        """All its blocks return to their pools."""
        self.pool.release(seq.blocks)
        if self.windowed is not None:
            self.windowed.release(seq.window_blocks)
        seq.blocks, seq.window_blocks, seq.num_published = [], [], 0

    def _preempt(self, seq: Sequence) -> None:
        """Back to the queue; its KV is recomputed later (or found again in the prefix cache)."""
        self._release(seq)
        seq.evicted = False
        seq.num_preempted += 1
        self.num_preemptions += 1
        seq.state = SequenceState.WAITING
        bisect.insort(self._waiting, seq, key=lambda s: s.rank_key)

    def _publish(self, seq: Sequence) -> None:
        num_full = seq.num_computed // self.pool.block_size
        for idx in range(seq.num_published, num_full):
            content_hash = self.pool.hash_of(seq.tokens, idx, seq.hashes)
            self.pool.publish(seq.blocks[idx], content_hash)
            if self.windowed is not None:
                self.windowed.pool.publish(seq.window_blocks[idx], content_hash)
        seq.num_published = num_full

    def _append(self, seq: Sequence, token: int) -> Progress:
        tokens, sampling = seq.tokens, seq.sampling
        first_idx = len(tokens) - seq.num_prompt
        tokens.append(token)
        finish: FinishReason | None = None
        if token in sampling.stop_token_ids and first_idx >= sampling.min_tokens:
            finish = FinishReason.STOP
        elif first_idx + 1 >= sampling.max_tokens or len(tokens) >= self.config.max_context:
            finish = FinishReason.LENGTH
        if finish is not None:
            del self._by_id[seq.req_id]
            self._leave(seq)
        return Progress(seq, first_idx, (token,), finish)

    def _leave(self, seq: Sequence) -> None:
        if seq.state is SequenceState.WAITING:
            self._waiting.remove(seq)
        else:
            self._release(seq)
        seq.state = SequenceState.FINISHED

    def _release(self, seq: Sequence) -> None:
        self._give_back(seq)
        self._suspects.discard(seq)
        seq.num_computed = 0
        self._running[seq.stream].remove(seq)
        seq.stream = -1

    def _balance(self, stream: int) -> None:
        """Move committed sequences of `stream` to the lightest one while that evens the load."""
        members, closed = self._running[stream], stream >= self.num_streams
        for seq in list(members):
            if not closed and len(members) - min(map(len, self._running[: self.num_streams])) <= 1:
                return
            if not seq.in_flight:
                target = self._lightest()
                members.remove(seq)
                self._running[target].append(seq)
                seq.stream = target


def _ends(item: BatchItem, max_context: int) -> bool:
    """Whether its sequence will not be there after the next commit, as far as its length and what it was told say."""
    seq, num_tokens = item.seq, item.start + item.num_new + 1
    out_of_room = num_tokens >= min(seq.num_prompt + seq.sampling.max_tokens, max_context)
    return out_of_room or seq.doomed is not None or seq.evicted


def _extend(held: list[int], pool: BlockPool, missing: int) -> None:
    """Add `missing` fresh blocks, which are known to be free."""
    if missing > 0:
        blocks = pool.allocate(missing)
        assert blocks is not None
        held.extend(blocks)


def _decoding(seqs: Seq[Sequence]) -> list[Sequence]:
    """The sequences past their prefill."""
    return [seq for seq in seqs if seq.decoding]


def _decode_load(seqs: Seq[Sequence]) -> StepLoad:
    """The load of a step with one decode of each."""
    lengths = [len(seq.tokens) for seq in seqs]
    return StepLoad(len(lengths), sum(attended(length - 1, 1) for length in lengths), len(lengths))
