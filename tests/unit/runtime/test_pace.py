from __future__ import annotations

from itertools import pairwise

from polyphase.runtime.pace import CALM_NS, MAX_DELAY_NS, SnapshotPace


def test_snapshots_become_rarer_and_after_a_calm_minute_free_again():
    pace = SnapshotPace()
    times = [now_ms for now_ms in range(120_000) if pace.try_begin(now_ms * 1_000_000)]
    assert times[:8] == [0, 250, 750, 1750, 3750, 7750, 15750, 31750]
    assert {later - earlier for earlier, later in pairwise(times[7:])} == {MAX_DELAY_NS // 1_000_000}
    calm_ns = times[-1] * 1_000_000 + MAX_DELAY_NS + CALM_NS
    assert [pace.try_begin(calm_ns + offset_ms * 1_000_000) for offset_ms in (0, 100, 260)] == [True, False, True]
