"""What is said in `polyphase demo`. The system prompt is the one the demo model was trained with; everybody in the demo shares it."""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class OwnConversation:
    """What somebody else has talked of with the model before, and asks now."""

    earlier: tuple[tuple[str, str], ...]  # questions with their answers
    question: str


# At the same time, each by somebody else. What went before is long enough for a prefill worker.
VISITORS: tuple[OwnConversation, ...] = (
    OwnConversation(
        (
            ("What does shutil.rmtree do?", "Recursively delete a directory tree."),
            ("And shutil.move?", "Recursively move a file or directory to another location. This is similar to the Unix 'mv' command."),
        ),
        "How do I copy a file?",
    ),
    OwnConversation(
        (
            (
                "What does os.path.split do?",
                "Split a pathname. Returns tuple '(head, tail)' where 'tail' is all after the final slash.",
            ),
            ("What does os.path.exists do?", "Test whether a path exists. Returns False for broken symbolic links."),
        ),
        "What does os.path.join do?",
    ),
    OwnConversation(
        (
            ("Hi!", "Hello! Ask me about a function or a module of Python's standard library."),
            ("What can you do?", "I can say what functions, classes and modules of the standard library do, and show their signatures."),
        ),
        "What is Polyphase?",
    ),
    OwnConversation(
        (
            ("What does random.choice do?", "Choose a random element from a non-empty sequence."),
            (
                "What does random.seed do?",
                "Initialize internal state from a seed. None or no argument seeds from current time.",
            ),
        ),
        "What is the capital of France?",
    ),
)

TEMPERATURE = 0.0
MAX_TOKENS = 96
SPLIT_THRESHOLD_TOKENS = 32  # low, because the demo's prompts are short
