"""The bookings against a model that keeps a plain list of legs and adds them up each time."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polyphase.core.ids import RequestId, WorkerId
from polyphase.router.bookings import Booked, Bookings, LegBooking

P, D = WorkerId("prefill-0"), WorkerId("decode-0")
R = RequestId("r")


def booked(prefill_tokens: int, block_count: int, request_count: int) -> Booked:
    return Booked(prefill_tokens, block_count, request_count)


def test_a_split_request_moves_from_prefill_to_decode():
    bookings = Bookings()
    bookings.book(R, [LegBooking(D, 0, 70), LegBooking(P, 1000, 63, ends_with_prefill=True)])
    assert (bookings.of(P), bookings.of(D)) == (booked(1000, 63, 1), booked(0, 70, 1))
    bookings.end_prefill(R)
    bookings.end_prefill(R)
    assert (bookings.of(P), bookings.of(D)) == (booked(0, 0, 0), booked(0, 70, 1))
    bookings.release(R)
    bookings.release(R)
    bookings.end_prefill(R)
    assert bookings.total().is_zero()
    bookings.check()


def test_booking_again_replaces():
    bookings = Bookings()
    bookings.book(R, [LegBooking(D, 100, 7)])
    bookings.book(R, [LegBooking(P, 50, 4)])
    assert bookings.of(D).is_zero()
    assert bookings.of(P) == booked(50, 4, 1)


def test_a_lost_worker_takes_its_bookings_along_and_a_late_release_is_harmless():
    bookings = Bookings()
    bookings.book(R, [LegBooking(D, 0, 70), LegBooking(P, 1000, 63, ends_with_prefill=True)])
    bookings.drop_worker(D)
    assert bookings.of(P) == booked(1000, 63, 1)
    bookings.release(R)
    bookings.check()
    assert bookings.total().is_zero()


def test_a_report_covers_what_was_booked_before_it():
    bookings = Bookings()
    bookings.book(R, [LegBooking(D, 100, 7)])
    assert bookings.sums_of(D)[1] == booked(100, 7, 1)
    bookings.mark_reported(D)
    bookings.book(RequestId("later"), [LegBooking(D, 30, 2)])
    assert bookings.sums_of(D)[1] == booked(30, 2, 1)
    bookings.release(R)
    bookings.check()
    assert (bookings.of(D), bookings.sums_of(D)[1]) == (booked(30, 2, 1), booked(30, 2, 1))


@dataclass
class ModelLeg:
    request_id: RequestId
    leg: LegBooking
    is_reported: bool = False


WORKERS = st.sampled_from([WorkerId(name) for name in "abc"])
REQUESTS = st.sampled_from([RequestId(str(number)) for number in range(6)])
LEGS = st.lists(
    st.builds(LegBooking, WORKERS, st.integers(0, 50), st.integers(0, 9), st.booleans()), max_size=2, unique_by=lambda leg: leg.worker_id
)


class BookingsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.bookings = Bookings()
        self.model: list[ModelLeg] = []

    @rule(request_id=REQUESTS, legs=LEGS)
    def book(self, request_id: RequestId, legs: list[LegBooking]) -> None:
        self.bookings.book(request_id, legs)
        self.model = [kept for kept in self.model if kept.request_id != request_id]
        self.model += [ModelLeg(request_id, leg) for leg in legs]

    @rule(request_id=REQUESTS)
    def end_prefill(self, request_id: RequestId) -> None:
        self.bookings.end_prefill(request_id)
        self.model = [kept for kept in self.model if kept.request_id != request_id or not kept.leg.ends_with_prefill]
        for kept in self.model:
            if kept.request_id == request_id:
                kept.leg = LegBooking(kept.leg.worker_id, 0, kept.leg.block_count)

    @rule(request_id=REQUESTS)
    def release(self, request_id: RequestId) -> None:
        self.bookings.release(request_id)
        self.model = [kept for kept in self.model if kept.request_id != request_id]

    @rule(worker_id=WORKERS)
    def drop_worker(self, worker_id: WorkerId) -> None:
        self.bookings.drop_worker(worker_id)
        self.model = [kept for kept in self.model if kept.leg.worker_id != worker_id]

    @rule(worker_id=WORKERS)
    def report(self, worker_id: WorkerId) -> None:
        self.bookings.mark_reported(worker_id)
        for kept in self.model:
            if kept.leg.worker_id == worker_id:
                kept.is_reported = True

    @invariant()
    def sums_agree(self) -> None:
        self.bookings.check()
        total = Booked()
        for worker_id in map(WorkerId, "abc"):
            everything, unreported = Booked(), Booked()
            for kept in self.model:
                if kept.leg.worker_id == worker_id:
                    everything.add(kept.leg.prefill_tokens, kept.leg.block_count, 1)
                    total.add(kept.leg.prefill_tokens, kept.leg.block_count, 1)
                    if not kept.is_reported:
                        unreported.add(kept.leg.prefill_tokens, kept.leg.block_count, 1)
            assert self.bookings.of(worker_id) == everything
            assert self.bookings.sums_of(worker_id) == (everything, unreported)
        assert self.bookings.total() == total

    def teardown(self) -> None:
        for kept in self.model:
            self.bookings.release(kept.request_id)
        assert self.bookings.total().is_zero()
        self.bookings.check()


BookingsMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestBookings = BookingsMachine.TestCase
