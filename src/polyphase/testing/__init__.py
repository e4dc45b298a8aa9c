"""For tests and benchmarks, ours and others': start a real deployment, look into it, hurt it, and see that nothing stays behind."""

from polyphase.testing.deployment import Deployment, free_port

__all__ = ["Deployment", "free_port"]
