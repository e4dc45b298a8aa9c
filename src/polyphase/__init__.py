"""Polyphase serves large language models over many accelerators.

Each folder is one plane of the system; `docs/architecture.md` is the map and says who may import whom.
"""

__version__ = "0.1.0"
