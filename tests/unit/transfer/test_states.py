"""A life with faults: leases, registrations and transfers over the `memory` backend, against a naive model, on Hypothesis' seeds.

The network loses, delays, reorders, damages and stalls. Whatever happens: a transfer ends by its deadline; a block with the verdict DONE
holds exactly what was offered; nobody writes behind the end; a lease ends once, for a reason; a pinned block does not change.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from polyphase.core.errors import ForeignDescriptor, HandleReleased, KvError, PeerLost, StaleDescriptor, TransferError
from polyphase.transfer import Agent, Region, Session, SharedPool, Transfer, Verdict
from polyphase.transfer.backends.memory import Faults, MemoryNetwork
from polyphase.wire.transfer import BlockOffer

BLOCKS, WIDTH = 6, 64
RARELY = st.integers(0, 5)  # what it draws must be 0
DEADLINE_S = 0.5
SLACK_NS = 50_000_000  # a backend notices a stop within so long


@dataclass
class Life:
    """One agent with its pool, and what the model knows of it."""

    agent: Agent
    pool: SharedPool
    region: Region
    content: dict[int, bytes] = field(default_factory=dict)
    written: set[int] = field(default_factory=set)  # by peers, so that the model does not know what they hold
    is_alive: bool = True


@dataclass
class Given:
    offer: BlockOffer
    owner: Life
    content: list[bytes]
    expires_at_ns: int
    ends: list[str] = field(default_factory=list)
    takers: list[tuple[Life, int]] = field(default_factory=list)  # and when


@dataclass
class Posted:
    transfer: Transfer
    reader: Life
    targets: list[int]
    wanted: list[bytes]
    deadline_ns: int
    is_checked: bool = False


class Lives(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 10**6), faults=st.sampled_from(["none", "few", "many"]))
    def begin(self, seed: int, faults: str) -> None:
        odds = {"none": 0.0, "few": 0.05, "many": 0.3}[faults]
        self.network = MemoryNetwork(
            seed,
            Faults(odds, odds, odds / 3, seed % 2 == 0, (1_000, 20_000_000), (1_000, 5_000_000)),
        )
        self.lives: dict[str, Life] = {}
        self.sessions: dict[tuple[str, str], Session] = {}
        self.offers: list[Given] = []
        self.posted: list[Posted] = []
        self.graves: list[Life] = []
        self.counter = 0
        for name in ("a", "b", "c"):
            self._be_born(name)

    def _be_born(self, name: str) -> None:
        self.counter += 1
        agent = Agent(name, backends=[self.network.backend()], runtime=self.network.runtime(), epoch=self.counter)
        pool = SharedPool.create(BLOCKS, WIDTH)
        self.lives[name] = Life(agent, pool, agent.register(pool))
        for block_id in range(BLOCKS):
            self._fill(self.lives[name], block_id)

    def _fill(self, life: Life, block_id: int) -> None:
        self.counter += 1
        content = self.counter.to_bytes(8, "big") * (WIDTH // 8)
        life.pool.blocks[block_id * WIDTH : (block_id + 1) * WIDTH] = content
        life.content[block_id] = content
        life.written.discard(block_id)

    def _now(self) -> int:
        return self.network.scheduler.clock.now_ns()

    def _session(self, reader: str, owner: str) -> Session | None:
        session = self.sessions.get((reader, owner))
        life = self.lives[owner].agent.card
        if session is not None and session.peer.epoch == life.epoch and not session.is_released:
            return session
        if session is not None and not session.is_released:
            session.release()
        try:
            session = self.lives[reader].agent.connect(life)
        except (PeerLost, StaleDescriptor):
            return None
        self.sessions[reader, owner] = session
        return session

    # What agents do.

    @rule(
        name=st.sampled_from("abc"),
        block_ids=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=4, unique=True),
        ttl_ms=st.sampled_from([20, 100, 1000]),
    )
    def offer(self, name: str, block_ids: list[int], ttl_ms: int) -> None:
        life = self.lives[name]
        made = Given(None, life, [], 0)  # type: ignore[arg-type]
        block_ids = [block_id for block_id in block_ids if block_id not in life.written]
        if not block_ids:
            return
        made.offer = life.region.offer(block_ids, ttl_ms / 1000, lambda _, why: made.ends.append(why.reason))
        made.content = [life.content[block_id] for block_id in block_ids]
        made.expires_at_ns = self._now() + ttl_ms * 1_000_000
        self.offers.append(made)

    @rule(back=st.integers(0, 2), reader=st.sampled_from("abc"), order=st.permutations(range(BLOCKS)))
    def read(self, back: int, reader: str, order: list[int]) -> None:
        if not self.offers:
            return
        self._read(self.offers[max(0, len(self.offers) - 1 - back)], reader, order)

    @rule(
        name=st.sampled_from("abc"),
        reader=st.sampled_from("abc"),
        block_ids=st.lists(st.integers(0, BLOCKS - 1), min_size=1, max_size=4, unique=True),
        order=st.permutations(range(BLOCKS)),
        pause_ms=st.sampled_from([0, 5, 15, 30]),
        is_rewritten=st.booleans(),
    )
    def race(self, name: str, reader: str, block_ids: list[int], order: list[int], pause_ms: int, is_rewritten: bool) -> None:
        """A lease ends while its blocks are read, and the owner may put other content into them at once."""
        before = len(self.offers)
        self.offer(name, block_ids, pause_ms + 1)
        if len(self.offers) == before:
            return
        self._read(self.offers[-1], reader, order)
        self.network.run((pause_ms + 2) * 1_000_000)
        for block_id in self.offers[-1].offer.block_ids if is_rewritten else []:
            if self.lives[name].region.generations([block_id])[0] in self.offers[-1].offer.generations:
                self.rewrite(name, block_id)

    def _read(self, made: Given, reader: str, order: list[int]) -> None:
        name = made.offer.agent.agent_id
        life = self.lives[reader]
        session = self._session(reader, name)
        if session is None:
            return
        if session.peer.epoch != made.offer.agent.epoch:
            with pytest.raises(ForeignDescriptor):
                session.take(made.offer)
            return
        busy = {target for posted in self.posted if posted.reader is life and not posted.is_checked for target in posted.targets}
        places = [target for target in order if target not in busy and target not in life.region.pinned()][: len(made.content)]
        if len(places) < len(made.content):
            return
        remote = session.take(made.offer)
        made.takers.append((life, self._now()))
        life.region.renew(places)
        life.written.update(places)
        transfer = session.read(remote, life.region.blocks(places), DEADLINE_S)
        self.posted.append(Posted(transfer, life, places, made.content, self._now() + int(DEADLINE_S * 1e9)))

    @rule(back=st.integers(0, 5), reader=st.sampled_from("abc"))
    def give_back(self, back: int, reader: str) -> None:
        if not self.offers:
            return
        made = self.offers[max(0, len(self.offers) - 1 - back)]
        session = self.sessions.get((reader, made.offer.agent.agent_id))
        if session is not None and not session.is_released and session.peer.epoch == made.offer.agent.epoch:
            session.give_back(made.offer.lease_id)

    @rule(name=st.sampled_from("abc"), block_id=st.integers(0, BLOCKS - 1))
    def rewrite(self, name: str, block_id: int) -> None:
        """The owner gives a block to other content, if nobody holds a lease on it."""
        life = self.lives[name]
        if any(block_id in posted.targets for posted in self.posted if posted.reader is life and not posted.is_checked):
            return
        if block_id in life.region.pinned():
            with pytest.raises(KvError, match="under lease"):
                life.region.renew([block_id])
            return
        life.region.renew([block_id])
        self._fill(life, block_id)

    @rule(which=st.integers(0, 20), chance=RARELY)
    def cancel(self, which: int, chance: int) -> None:
        if chance:
            return
        running = [posted for posted in self.posted if not posted.is_checked]
        if running:
            running[which % len(running)].transfer.cancel()

    @rule(name=st.sampled_from("abc"), chance=RARELY)
    def release_region(self, name: str, chance: int) -> None:
        """And register the same memory again."""
        if chance:
            return
        life = self.lives[name]
        released = life.region
        released.release()
        for use in (released.release, lambda: released.blocks([0]), lambda: released.offer([0], 1)):
            with pytest.raises(HandleReleased):
                use()
        life.region = life.agent.register(life.pool)

    @rule(pair=st.sampled_from([("a", "b"), ("b", "c"), ("c", "a")]), chance=RARELY)
    def release_session(self, pair: tuple[str, str], chance: int) -> None:
        if chance:
            return
        session = self.sessions.pop(pair, None)
        if session is None:
            return
        if session.is_released:
            with pytest.raises(HandleReleased):
                session.release()
        else:
            session.release()

    @rule(name=st.sampled_from("abc"), is_tidy=st.booleans(), chance=RARELY)
    def die(self, name: str, is_tidy: bool, chance: int) -> None:
        """kill -9, or an orderly end; then a next life."""
        if chance:
            return
        life = self.lives[name]
        life.is_alive = False
        if is_tidy:
            life.agent.close()
        else:
            self.network.crash(name)
        for key in [key for key in self.sessions if key[0] == name]:
            del self.sessions[key]
        died_ns = self._now()
        self.graves.append(life)
        self._be_born(name)
        self.network.run(20_000_000)
        for made in self.offers:
            dead = [taker for taker, taken_ns in made.takers if not taker.is_alive and taken_ns < died_ns - 10_000_000]
            if made.owner.is_alive and dead and len(dead) == len(made.takers):
                assert made.ends, "a dead reader's lease was kept"

    @rule(duration_ms=st.sampled_from([1, 5, 20, 20, 100]))
    def let_time_pass(self, duration_ms: int) -> None:
        self.network.run(duration_ms * 1_000_000)

    # What must hold.

    @invariant()
    def transfers_end_and_good_blocks_are_good(self) -> None:
        for posted in self.posted:
            if posted.is_checked or not posted.reader.is_alive:
                continue
            outcome = posted.transfer.outcome
            if outcome is None:
                assert self._now() <= posted.deadline_ns + SLACK_NS, "a transfer outlived its deadline"
                continue
            posted.is_checked = True
            assert Verdict.PENDING not in outcome.verdicts
            for target, wanted, verdict in zip(posted.targets, posted.wanted, outcome.verdicts, strict=True):
                found = bytes(posted.reader.pool.blocks[target * WIDTH : (target + 1) * WIDTH])
                if verdict == Verdict.DONE:
                    assert found == wanted, "a block with the verdict DONE holds something else"
                posted.reader.content[target] = found
                posted.reader.written.discard(target)

    @invariant()
    def nobody_writes_unasked(self) -> None:
        for life in self.lives.values():
            busy = {target for posted in self.posted if posted.reader is life and not posted.is_checked for target in posted.targets}
            for block_id, content in life.content.items():
                if block_id not in busy and block_id not in life.written:
                    assert bytes(life.pool.blocks[block_id * WIDTH : (block_id + 1) * WIDTH]) == content

    @invariant()
    def leases_end_once_and_pins_are_those_of_living_leases(self) -> None:
        for made in self.offers:
            assert len(made.ends) <= 1
            if made.owner.is_alive and not made.ends:
                assert self._now() <= made.expires_at_ns, "a lease outlived its time"
        for life in self.lives.values():
            expected = {b for made in self.offers if made.owner is life and not made.ends for b in made.offer.block_ids}
            assert life.region.pinned() == expected

    def teardown(self) -> None:
        if not hasattr(self, "network"):
            return
        self.network.run(2 * 10**9)
        self.transfers_end_and_good_blocks_are_good()
        living = [posted for posted in self.posted if posted.reader.is_alive]
        assert all(posted.is_checked for posted in living)
        for life in self.lives.values():
            assert not life.region.pinned()
            life.agent.close()
        for life in [*self.lives.values(), *self.graves]:
            try:
                life.agent.close()
            except TransferError as error:
                raise AssertionError("an agent cannot be closed after its peers died") from error
        self.network.close()
        for life in [*self.lives.values(), *self.graves]:
            life.pool.close()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=80, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck))
