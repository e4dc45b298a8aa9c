"""Prepares grammars beside the steps: a request waits for its own, and nobody else waits.

    prepare(request) ─► Future ── in a thread: grammar (kept) ─ copy ─ output emitted elsewhere ─► GrammarMatcher

What a frontend sends has been prepared once before, in a process that could have been killed (`frontend.grammar_checks`), so it takes no
longer here than was allowed there.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from threading import Lock

from polyphase.core.errors import InvalidRequest
from polyphase.text import GrammarMatcher, GrammarVocabulary
from polyphase.wire.requests import Grammar, Submit

Preparation = Future[GrammarMatcher]

_THREADS = 2  # so that a slow one does not hold up all others
_MOST_KEPT = 256  # grammars; usually some 100 KB each


class Grammars:
    """Of one engine. `on_ready` is called in a thread of ours whenever a preparation has ended, well or not."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._vocabulary = vocabulary
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="grammars")
        self._kept: OrderedDict[Grammar, GrammarMatcher] = OrderedDict()  # at the beginning; the last used is last
        self._lock = Lock()
        self._open: set[Preparation] = set()
        self.on_ready: Callable[[], None] = lambda: None

    def prepare(self, request: Submit) -> Preparation:
        """The future ends with an InvalidRequest if the grammar is none, or the output so far does not fit it. It may be cancelled."""
        assert request.grammar is not None
        future = self._threads.submit(self._start, request.grammar, request.token_ids[request.prompt_token_count :])
        self._open.add(future)
        future.add_done_callback(self._note_done)
        return future

    def wait(self) -> None:
        """Until everything is prepared that was asked for; for whoever steps without an event loop."""
        wait(set(self._open))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _note_done(self, future: Preparation) -> None:
        self._open.discard(future)
        self.on_ready()

    def _start(self, grammar: Grammar, emitted: list[int]) -> GrammarMatcher:
        matcher = self._fresh(grammar)
        if not emitted or matcher.accept(emitted):
            return matcher
        # Another kind of engine may have let more whitespace be.
        matcher = self._vocabulary.start(grammar, any_whitespace=True)
        if not matcher.accept(emitted):
            raise InvalidRequest(f"the {len(emitted)} tokens that were emitted elsewhere do not begin a sentence of the request's grammar")
        return matcher

    def _fresh(self, grammar: Grammar) -> GrammarMatcher:
        """Two that want the same at once may both prepare it; the later one is kept."""
        with self._lock:
            kept = self._kept.get(grammar)
            if kept is not None:
                self._kept.move_to_end(grammar)
                return kept.copy()
        made = self._vocabulary.start(grammar)
        with self._lock:
            self._kept[grammar] = made
            while len(self._kept) > _MOST_KEPT:
                self._kept.popitem(last=False)
            return made.copy()
