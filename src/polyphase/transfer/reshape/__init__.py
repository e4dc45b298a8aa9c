"""KV blocks of one shape become blocks of another: other tensor-parallel sizes, block sizes, dtypes and orders of axes.

`plan` decides from both sides' descriptors, or says why it cannot be done; `plan_regions` does so when agents meet. `fetch` reads the
blocks that a plan needs from each source rank and puts the target's together, with a verdict on each; `apply` is its second half.
"""

from polyphase.transfer.reshape.apply import apply
from polyphase.transfer.reshape.fetch import fetch, plan_regions
from polyphase.transfer.reshape.plan import Piece, Plan, plan
from polyphase.wire.layout import KvShape, from_layout

__all__ = ["KvShape", "Piece", "Plan", "apply", "fetch", "from_layout", "plan", "plan_regions"]
