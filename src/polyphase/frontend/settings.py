"""What an operator may set about a frontend's HTTP side and its patience."""

from __future__ import annotations

from dataclasses import dataclass, field

from polyphase.frontend.stall import StallRule
from polyphase.router import AdmissionSettings


@dataclass(frozen=True, slots=True)
class FrontendSettings:
    max_body_bytes: int = 45_000_000
    body_timeout_s: float = 60.0  # for a request's body to arrive
    request_timeout_s: float = 600.0  # from acceptance to the last token; then 504
    migration_limit: int = 3  # how often one sequence may be taken up after a worker died, failed or stood still with it
    migration_patience_s: float = 5.0  # how long sequences wait for a worker to join, when the last one was lost
    move_patience_s: float = 30.0  # the same for one that its worker handed back unharmed
    kv_flow: bool = True  # prompts' KV goes to the decode worker while the rest is computed, not only at the end
    drain_patience_s: float = 2.0  # what a draining worker's requests get to end there, before they go on elsewhere
    stall: StallRule = field(default_factory=StallRule)
    thread_above_chars: int = 50_000  # longer prompts are tokenised in a thread
    max_sequences: int = 128  # of one request: prompts times n
    record_count: int = 1000
    grammar_cpu_s: float = 1.0  # of CPU time to prepare a grammar that is not known yet; a usual schema takes 1 ms
    card_timeout_s: float = 10.0  # for a worker that joined to hand out its model card
    drain_timeout_s: float = 30.0
    admission: AdmissionSettings = field(default_factory=AdmissionSettings)
