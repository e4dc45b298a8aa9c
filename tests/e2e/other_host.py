"""`python -m tests.e2e.other_host ID WORKER-FLAGS…`: a worker that takes itself to be on a host of its own.

The kernel's boot id, by which agents know that they share a host, is the same in all network namespaces of one machine.
"""

from __future__ import annotations

import sys

from polyphase.transfer import agent
from polyphase.worker.__main__ import main

if __name__ == "__main__":
    name = sys.argv.pop(1)
    agent.host_id = lambda: name
    sys.exit(main())
