"""What a process says about itself: log lines with request ids, its memory and age.

Nothing here decides anything, and no plane depends on what was logged.
"""

from polyphase.observe.logs import configure_logging, current_request_id, request_context
from polyphase.observe.process import rss_bytes, uptime_s

__all__ = ["configure_logging", "current_request_id", "request_context", "rss_bytes", "uptime_s"]
