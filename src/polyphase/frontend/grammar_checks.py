"""Whether a grammar can be followed, found out before its request is sent anywhere, without a risk to the frontend or a worker.

    grammar ─► known verdict? ─ no ─► a thread ─► a process of its own (`grammar_process`) ─► verdict, kept
                                                  dies of what takes too long, or too much memory or stack; that is a verdict, too

Started when it is first needed; a deployment without structured output never has it.
"""

from __future__ import annotations

import asyncio
import logging
import select
import signal
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import msgspec

from polyphase.core.errors import Draining, InvalidRequest, Overloaded
from polyphase.frontend.grammar_process import Check, Verdict, Vocabulary, read_frame, write_frame
from polyphase.frontend.grammars import GrammarWish
from polyphase.frontend.models import ServedModel
from polyphase.wire.requests import Grammar

log = logging.getLogger(__name__)

MAX_WAITING = 64
_MOST_KEPT = 4096  # verdicts
_ANSWER_TIMEOUT_S = 30.0  # of the clock on the wall, on a machine that is short of CPU
_COMMAND = (sys.executable, "-m", "polyphase.frontend.grammar_process")
_VERDICTS = msgspec.msgpack.Decoder(Verdict)


class GrammarChecks:
    """Of one frontend. Owner: whoever made it closes it."""

    def __init__(self, cpu_limit_s: float, command: Sequence[str] = _COMMAND, answer_timeout_s: float = _ANSWER_TIMEOUT_S) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar-checks")
        self._checker = _Checker(cpu_limit_s, command, answer_timeout_s)
        self._verdicts: OrderedDict[tuple[str, Grammar], str | None] = OrderedDict()
        self._waiting_count = 0

    async def check(self, wish: GrammarWish, model: ServedModel) -> None:
        """Raises: InvalidRequest with the reason, if it cannot be followed; Overloaded if too many wait, or the machine is too busy."""
        key = (_key(model), wish.grammar)
        if key in self._verdicts:
            self._verdicts.move_to_end(key)
            error = self._verdicts[key]
        else:
            error = await self._ask(wish.grammar, model)
            self._verdicts[key] = error
            while len(self._verdicts) > _MOST_KEPT:
                self._verdicts.popitem(last=False)
        if error is not None:
            raise InvalidRequest(f"{wish.param}: {error}", param=wish.param)

    async def _ask(self, grammar: Grammar, model: ServedModel) -> str | None:
        if self._waiting_count >= MAX_WAITING:
            raise Overloaded(f"{self._waiting_count} grammars wait to be checked already; retry later")
        self._waiting_count += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, self._checker.check, grammar, model)
        finally:
            self._waiting_count -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._checker.end()
        self._thread.shutdown()


class _Checker:
    """The process, started anew when it has died. Used by one thread; `end` by any."""

    def __init__(self, cpu_limit_s: float, command: Sequence[str], answer_timeout_s: float) -> None:
        self._cpu_limit_s = cpu_limit_s
        self._command = command
        self._timeout_s = answer_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._known: set[str] = set()  # vocabularies that this life of it has
        self._lock = Lock()  # around what `end` may interfere with
        self._has_ended = False

    def check(self, grammar: Grammar, model: ServedModel) -> str | None:
        """What is wrong with the grammar. Raises: Overloaded; RuntimeError if the process cannot do its work."""
        process, key = self._alive(), _key(model)
        if key not in self._known:
            verdict = self._exchange(process, _vocabulary(model, key))
            if verdict is None or verdict.error is not None:
                raise RuntimeError(f"grammars cannot be checked: {verdict.error if verdict else f'exit code {process.wait()}'}")
            self._known.add(key)
        verdict = self._exchange(process, Check(key, grammar, self._cpu_limit_s))
        if verdict is not None:
            return verdict.error
        code = process.wait()
        log.warning("a grammar was too much for the process that checks them (exit code %d)", code)
        if code == -signal.SIGPROF:
            return f"it takes more than {self._cpu_limit_s:g} s of CPU time to prepare; make it simpler"
        return "it is too large or too deeply nested to be prepared"

    def end(self) -> None:
        with self._lock:
            self._has_ended = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    def _alive(self) -> subprocess.Popen[bytes]:
        if self._process is None or self._process.poll() is not None:
            self._close_pipes()
            self._known.clear()
            with self._lock:
                if self._has_ended:
                    raise Draining("this frontend is going away; send the request again")
                self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        return self._process

    def _exchange(self, process: subprocess.Popen[bytes], message: Vocabulary | Check) -> Verdict | None:
        """None: it has died of it. Raises: Overloaded if no answer comes; then it is ended."""
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            write_frame(process.stdin, message)
        except BrokenPipeError:
            return None
        if not select.select([process.stdout], [], [], self._timeout_s)[0]:
            process.kill()
            process.wait()
            raise Overloaded(f"the grammar was not checked within {self._timeout_s:g} s; retry later")
        data = read_frame(process.stdout)
        return None if data is None else _VERDICTS.decode(data)

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout) if self._process is not None else ():
            assert pipe is not None
            try:
                pipe.close()
            except BrokenPipeError:
                pass


def _key(model: ServedModel) -> str:
    return "".join(model.identity[name] for name in ("tokenizer_json", "vocab_size", "eos_token_ids"))


def _vocabulary(model: ServedModel, key: str) -> Vocabulary:
    return Vocabulary(key, model.tokenizer.to_json(), model.card.vocab_size, model.card.eos_token_ids)
