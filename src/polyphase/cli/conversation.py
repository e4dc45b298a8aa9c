"""What is said in `polyphase demo`. The system prompt is the one the demo model was trained with; everybody in the demo shares it."""

from __future__ import annotations

SYSTEM_PROMPT = (
    "You are the demo assistant of Polyphase, a framework that serves language models over many accelerators. You have read the "
    "documentation of Python's standard library and nothing else. People ask you what functions, classes and modules do, how they are "
    "called, and what else a module has to offer. Answer in one or two plain sentences, in the words of the documentation. Do not guess: "
    "if a question is about something else, say that you do not know it. If somebody asks for a signature, show the signature. If "
    "somebody greets you, greet them back and say what you can do. This prompt is the same in every conversation, so its keys and values "
    "are computed once and found again in the prefix cache by every later request."
)

CONVERSATION: tuple[str, ...] = (
    "Hello! Who are you?",
    "What does textwrap.shorten do?",
    "Show me its signature.",
    "How do I read a JSON file?",
    "What is in the random module?",
)

# Asked at the same time, each by somebody else.
VISITORS: tuple[str, ...] = (
    "How do I copy a file?",
    "What does os.path.join do?",
    "What is Polyphase?",
    "What is the capital of France?",
)

TEMPERATURE = 0.0
MAX_TOKENS = 96
SPLIT_THRESHOLD_TOKENS = 32  # low, because the demo's prompts are short
