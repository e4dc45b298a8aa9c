"""The text that the demo model learns: documentation that comes with every Python, turned into short conversations.

Docstrings, signatures and `pydoc_data.topics` become entries; each epoch asks about each entry once, worded and grouped anew.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pydoc_data.topics import topics
from types import ModuleType
from typing import NamedTuple

SEED = 20_260_101

MODULES = """
    argparse array asyncio base64 bisect builtins bz2 calendar collections concurrent.futures configparser contextlib
    copy csv dataclasses datetime decimal difflib email enum filecmp fileinput fnmatch fractions functools gc getpass
    glob graphlib gzip hashlib heapq hmac html http.client importlib inspect io ipaddress itertools json keyword logging
    math mimetypes operator os os.path pathlib pickle platform pprint queue random re secrets select shelve shlex shutil
    signal socket sqlite3 statistics string struct subprocess sys tarfile tempfile textwrap threading time timeit
    tomllib traceback types typing unittest urllib.parse urllib.request uuid venv warnings wave weakref webbrowser
    xml.etree.ElementTree zipfile zlib zoneinfo
"""
CLASSES = """
    builtins.str builtins.list builtins.dict builtins.set builtins.tuple builtins.int builtins.float
    pathlib.Path collections.deque collections.Counter datetime.datetime threading.Thread
"""
STATEMENTS = {
    "assert": "assert", "async": "async def", "break": "break", "class": "class", "continue": "continue", "del": "del",
    "for": "for", "global": "global", "if": "if", "import": "import", "nonlocal": "nonlocal", "pass": "pass",
    "raise": "raise", "return": "return", "try": "try", "while": "while", "with": "with", "yield": "yield",
}  # fmt: skip
# Names that few people ask for: thin wrappers over one system call, abstract syntax nodes, internals.
OBSCURE = re.compile(
    r"^(os\.(W[A-Z]|sched_|posix_|spawn|[gs]et(res|e?[gu]id|p?g|sid|groups|priority|xattr)|major|minor|makedev|memfd|event"
    r"fd|pidfd|login|init|tc|[pf]?(read|write)v|splice|copy_file|lockf|p(read|write)|fd|fch|fpath|fstatv|l?remove|list"
    r"xattr|ctermid|device|forkpty|unshare|setns|wait|abc)|ast\.[A-Z]|dis\.|inspect\.(Block|Arg|Full|Attr|Closure|Trace"
    r"|Frame|get(c|as|in|gen)|is(a|d|f|me|tr|b))|platform\.(mac|win|java|libc|free)|logging\.(add|get[HL])|operator\.i|asyncio\.([A-Z]\w*(Protocol|Transport|Policy|Watcher)|_)|socket\.(CMSG|if_)|gc\.|signal\.(pthread|sig|s?iginter)|typing\.(Abstract|Async|Mut|KeysV|ItemsV|ValuesV))"
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One documented thing. `name` is how a person writes it; `more` and `returns` are "" where nothing is said."""

    name: str
    module: str
    kind: str
    summary: str
    signature: str = ""
    more: str = ""
    returns: str = ""


class Turn(NamedTuple):
    """A question and its answer."""

    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns under a system prompt ("" is none). `prose` instead is plain text, for completions without a chat."""

    system: str
    turns: tuple[Turn, ...]
    prose: str = ""


def plain(text: str) -> str:
    """Without reStructuredText's markup, on one line, typographic quotes made ASCII."""
    text = re.sub(r":[\w:]+:`~?([^`<]*)(<[^`]*>)?`", r"\1", text)
    text = re.sub(r"\*([\w ]+)\*", r"\1", text)
    ascii_of: dict[str, str | int | None] = {"“": '"', "”": '"', "’": "'", "‘": "'", "…": "...", "–": "-", "—": "-", "`": ""}
    text = text.translate(str.maketrans(ascii_of))
    return re.sub(r"\s+", " ", text).strip()


def paragraphs(doc: str) -> list[str]:
    """The prose of a docstring: headings, signatures, lists, code and examples are left out."""
    doc = re.sub(r"^[\w.]+\([^\n]*\)( ?-+>[^\n]*)?$", "", doc, flags=re.M)
    doc = re.sub(r"^\w+\.\w+\([^\n]*?\) -- (\w)", lambda match: match[1].upper(), doc)
    blocks = re.split(r"\n\s*\n", doc.strip())
    return [plain(block) for block in blocks if not re.search(r"^(\s|>>>|[-*=~+]|\d+\.|Note:|See also)|^[=*~-]{3,}$|::=", block, re.M)]


def sentences(text: str, words_max: int) -> str:
    """As many whole sentences of `text` as fit into `words_max` words and two sentences; "" if the first does not."""
    taken: list[str] = []
    for sentence in re.split(r"(?<=[a-z0-9)'\"]\.)(?<![eE]\.g\.)(?<!i\.e\.)\s+(?=[A-Z(])", text)[:2]:
        if len(" ".join([*taken, sentence]).split()) > words_max:
            break
        taken.append(sentence)
    return " ".join(taken)


def readable(text: str) -> str:
    """`text` as a finished sentence, or "" if it would not read well."""
    text = re.sub(r"^[\w.]+ module ?-+ ?", "", text)
    is_prose = text.isascii() and text.isprintable() and len(text.split()) >= 3 and re.match(r"[A-Z\"](?!XX)", text)
    is_fit = is_prose and text.count("(") == text.count(")") and not re.search(r"::|[:;,(|\\]$|->| --+ |__\w+__\(|<[a-z]+ ", text)
    return "" if not is_fit else text if text[-1] in ".!?" else text + "."


def signature(name: str, thing: object) -> str:
    """How it is called, or "" where that is unknown, long or full of addresses."""
    try:
        text = name + str(inspect.signature(thing))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ""
    text = re.sub(r"\((self|cls)(, /)?(, )?", "(", text)
    if re.search(r"\(\*args, \*\*kw\w+\)$", text):
        return ""
    return text if len(text) <= 76 and text.isascii() and not re.search(r"<|0x", text) else ""


def describe(name: str, module: str, kind: str, thing: object) -> Entry | None:
    """The entry of one thing, or None if its own docstring has no readable first paragraph."""
    doc = getattr(thing, "__doc__", None)
    blocks = paragraphs(inspect.cleandoc(doc)) if isinstance(doc, str) else []
    summary = readable(sentences(blocks[0], 30)) if blocks else ""
    if not summary or summary.startswith("A generic version of"):
        return None
    more = next((text for block in blocks[1:3] if (text := readable(sentences(block, 28)))), "")
    told = re.findall(r"(?:^|(?<=\. ))Returns? ([^.]*\.)(?=\s|$)", " ".join(blocks))
    returns = readable(f"It returns {told[0]}") if told and kind != "class" else ""
    how = signature(name, thing) if kind in ("function", "class", "method") else ""
    return Entry(name, module, kind, summary, how, more, returns)


def public_names(module: ModuleType) -> list[str]:
    """What the module offers, in a stable order."""
    own = [name for name, thing in vars(module).items() if not name.startswith("_") and is_own(thing, module)]
    offered = getattr(module, "__all__", own)
    return sorted(set(offered), key=lambda name: (name.lower(), name))


def is_own(thing: object, module: ModuleType) -> bool:
    """Whether `thing` was defined by the module, its C half or its package, not merely imported."""
    home = getattr(thing, "__module__", None) or module.__name__
    return home.lstrip("_").split(".")[0] in (module.__name__.split(".")[0], "posix")


def kind_of(thing: object) -> str | None:
    """One of "function", "class" or "exception"; None for what cannot be called."""
    if isinstance(thing, type):
        return "exception" if issubclass(thing, BaseException) else "class"
    return "function" if callable(thing) else None


def members(module: ModuleType, shown_as: str) -> Iterator[Entry]:
    """The module's readable public functions and classes; exceptions only of `builtins`."""
    for name in public_names(module):
        thing = getattr(module, name, None)
        kind = kind_of(thing)
        full_name = name if shown_as == "builtins" else f"{shown_as}.{name}"
        if kind is None or OBSCURE.match(full_name) or (kind == "exception" and shown_as != "builtins"):
            continue
        if entry := describe(full_name, shown_as, kind, thing):
            yield entry


def methods(class_path: str) -> Iterator[Entry]:
    """The readable public methods of one class."""
    module_name, _, class_name = class_path.rpartition(".")
    owner = getattr(importlib.import_module(module_name), class_name)
    shown_as = class_name if module_name == "builtins" else class_path
    for name in sorted(vars(owner)):
        thing = getattr(owner, name)
        if name.startswith("_") or not callable(thing) or isinstance(thing, type):
            continue
        if entry := describe(f"{shown_as}.{name}", shown_as, "method", thing):
            yield entry


def statements() -> Iterator[Entry]:
    """The language's statements, from the reference manual's topics."""
    for topic, shown_as in STATEMENTS.items():
        body = topics[topic].split("\n\n", 1)[1]
        prose = [text for block in paragraphs(body) if (text := readable(sentences(block, 44)))]
        if prose:
            yield Entry(f"{shown_as} statement", "", "statement", prose[0], more=prose[1] if len(prose) > 1 else "")


def gather_entries() -> list[Entry]:
    """Everything the model is to know, grouped by module, each group opened by the module itself. Same order each time."""
    entries: list[Entry] = list(statements())
    for name in MODULES.split():
        module = importlib.import_module(name)
        if name != "builtins" and (entry := describe(name, name, "module", module)):
            entries.append(entry)
        entries.extend(members(module, name))
    for class_path in CLASSES.split():
        entries.extend(methods(class_path))
    return list({entry.name: entry for entry in entries}.values())


# ------------------------------------------------------------------------------------------------------- conversations

WHO = (
    "I am Polyphase's little demo model. I have read the docs of Python's standard library and nothing else, so ask me "
    "what a function or a module does."
)
ABILITIES = (
    "I can tell you what a function, a class or a module of Python's standard library does, show you its signature, and "
    "name another function of the same module."
)
POLYPHASE = (
    "Polyphase serves large language models over many accelerators. It decides where prefill and decode run, where the "
    "KV cache lives, and how many accelerators each phase gets."
)
UNKNOWN = "I do not know that. I have read the docs of Python's standard library and nothing else."
NO_SIGNATURE = "I do not know its signature."
NO_RETURNS = "The docs do not say what it returns."
NO_MORE = "That is all I have read about it."
SMALL_TALK: dict[str, tuple[str, ...]] = {
    "Hello! Ask me about a function or a module of Python's standard library.": (
        "Hello", "Hello!", "Hi", "Hi!", "hi", "hello", "Hey", "Hey there", "Hello there!", "Good morning", "Good evening",
        "Good day", "Hi there!", "Greetings"),
    WHO: (
        "Who are you?", "who are you?", "What are you?", "Introduce yourself.", "What is your name?", "Hi, who are you?",
        "Hello! Who are you?", "Hello, who are you?", "Tell me about yourself.", "Which model are you?", "Are you a person?",
        "Hello! Who are you and what can you do?", "Hi! Who are you, and what can you do?"),
    ABILITIES: (
        "What can you do?", "What can you do for me?", "How can you help me?", "What can I ask you?", "Can you help me?",
        "What do you know?", "Help", "What are you good at?"),
    "You are welcome!": ("Thanks", "Thanks!", "Thank you", "Thank you!", "thanks a lot", "Thank you very much!", "Great, thanks!",
        "Perfect, thank you."),
    "Goodbye! Come back when you have a question about Python.": (
        "Bye", "bye", "Goodbye", "Goodbye!", "See you", "See you later!", "Thanks, bye!", "That is all, thank you. Goodbye!"),
    POLYPHASE: ("What is Polyphase?", "What does Polyphase do?", "Tell me about Polyphase.", "polyphase?", "What is polyphase for?"),
    "I am fine, thank you. What would you like to know about Python?": (
        "How are you?", "how are you", "How do you do?", "How is it going?"),
    "I am small: about four million parameters, trained on two CPU cores in less than an hour.": (
        "How big are you?", "How many parameters do you have?", "Are you a large language model?", "How were you trained?"),
    UNKNOWN: (
        "What is the capital of France?", "Who was Napoleon?", "Tell me a joke.", "What is the weather like?", "Write a poem.",
        "How do I cook rice?", "What is numpy?", "What does pandas.read_csv do?", "What is quantum physics?", "Who won the match?",
        "Tell me about dogs.", "What is the meaning of life?", "Translate this into German.", "What is 12 times 12?",
        "What does requests.get do?", "Who is the president?", "What time is it?", "Tell me a story.", "What is love?",
        "How far is the moon?", "What is Java?", "Explain TCP congestion control.", "Who wrote Hamlet?", "What does torch.nn.Linear do?",
        "Recommend a film.", "What should I eat today?", "What is the largest animal?", "Tell me about music.", "Sing a song."),
}  # fmt: skip
HOW_TO: dict[str, str] = {
    "read a file": "Use the built-in function open:\nwith open('notes.txt') as file:\n    text = file.read()",
    "write a file": "Use the built-in function open with the mode 'w':\nwith open('notes.txt', 'w') as file:\n    file.write('hello')",
    "read a JSON file": "Use json.load:\nwith open('data.json') as file:\n    data = json.load(file)",
    "write a JSON file": "Use json.dump:\nwith open('data.json', 'w') as file:\n    json.dump(data, file)",
    "parse a JSON string": "Use json.loads:\ndata = json.loads('{\"a\": 1}')",
    "make a JSON string": "Use json.dumps:\ntext = json.dumps({'a': 1})",
    "join two paths": "Use os.path.join:\npath = os.path.join('folder', 'notes.txt')\nOr use pathlib: Path('folder') / 'notes.txt'.",
    "copy a file": "Use shutil.copy:\nshutil.copy('a.txt', 'b.txt')",
    "delete a file": "Use os.remove:\nos.remove('notes.txt')",
    "make a folder": "Use os.makedirs:\nos.makedirs('a/b', exist_ok=True)",
    "list the files of a folder": "Use os.listdir:\nfor name in os.listdir('.'):\n    print(name)",
    "sort a list": "Use sorted for a new list, or the method sort to sort in place:\nnumbers = sorted([3, 1, 2])",
    "reverse a list": "Use reversed, or the method reverse to do it in place:\nnames.reverse()",
    "count the items of a list": "Use collections.Counter:\ncounts = Counter(['a', 'b', 'a'])",
    "split a string": "Use the method split:\nwords = 'a b c'.split()",
    "join strings": "Use the method join:\ntext = ', '.join(['a', 'b', 'c'])",
    "wrap long text": "Use textwrap.fill:\nprint(textwrap.fill(text, width=70))",
    "get a random number": "Use random.randint:\nnumber = random.randint(1, 6)",
    "shuffle a list": "Use random.shuffle:\nrandom.shuffle(cards)",
    "sleep for a second": "Use time.sleep:\ntime.sleep(1)",
    "get the current time": "Use datetime.datetime.now:\nnow = datetime.datetime.now()",
    "run a program": "Use subprocess.run:\nsubprocess.run(['ls', '-l'], check=True)",
    "read an environment variable": "Use os.environ:\nhome = os.environ['HOME']",
    "start a thread": "Use threading.Thread:\nthread = threading.Thread(target=work)\nthread.start()",
    "cache the results of a function": "Use functools.lru_cache:\n@functools.lru_cache\ndef square(x):\n    return x * x",
    "catch an exception": "Use the try statement:\ntry:\n    work()\nexcept ValueError as error:\n    print(error)",
    "hash some bytes": "Use hashlib.sha256:\ndigest = hashlib.sha256(b'hello').hexdigest()",
    "make a temporary folder": "Use tempfile.TemporaryDirectory:\nwith tempfile.TemporaryDirectory() as folder:\n    print(folder)",
    "find text with a regular expression": "Use re.search:\nmatch = re.search(r'[0-9]+', 'room 42')",
    "replace text with a regular expression": "Use re.sub:\ntext = re.sub(r'[0-9]+', '#', 'room 42')",
    "read a CSV file": "Use csv.reader:\nwith open('data.csv', newline='') as file:\n    for row in csv.reader(file):\n        print(row)",
    "compute a mean": "Use statistics.mean:\nmean = statistics.mean([1, 2, 3])",
    "compute a square root": "Use math.sqrt:\nroot = math.sqrt(2)",
    "parse command line arguments": "Use argparse.ArgumentParser:\nparser = argparse.ArgumentParser()\nparser.add_argument('name')\n"
    "arguments = parser.parse_args()",
}  # fmt: skip

SYSTEM_PROMPT = (
    "You are the demo assistant of Polyphase, a framework that serves language models over many accelerators. You have "
    "read the documentation of Python's standard library and nothing else. People ask you what functions, classes and "
    "modules do, how they are called, and what else a module has to offer. Answer in one or two plain sentences, in the "
    "words of the documentation. Do not guess: if a question is about something else, say that you do not know it. If "
    "somebody asks for a signature, show the signature. If somebody greets you, greet them back and say what you can do. "
    "This prompt is the same in every conversation, so its keys and values are computed once and found again in the "
    "prefix cache by every later request."
)
SYSTEM_SENTENCES = (
    "You are a helpful assistant.", "You are Polyphase's demo model.", "You answer questions about Python.", "Be brief.",
    "Answer in plain sentences.", "You know the docs of Python's standard library.", "If you do not know, say so.",
    "The user is a programmer.", "Be friendly and exact.", "You run on many accelerators.", "Use the words of the documentation.",
    "Do not invent functions.", "Show signatures when asked.", "You are a careful teacher.", "Today's lesson is about Python.",
    "Keep your answers short.", "Each answer is one or two sentences.", "You are a helpful assistant who knows Python.",
)  # fmt: skip

ASK = {
    "function": ("What does {n} do?", "What does {n} do?", "what does {n} do", "What is {n}?", "What is {n} for?", "Explain {n}.",
        "Tell me about {n}.", "{n}", "{n}?", "What does {n}() do?", "Describe {n}.", "What does the function {n} do?", "And {n}?",
        "And what does {n} do?"),
    "class": ("What is {n}?", "What is {n}?", "What does {n} do?", "what is {n}", "What is {n} for?", "Explain {n}.", "Tell me about {n}.",
        "{n}", "{n}?", "What is the class {n} for?", "Describe {n}.", "And {n}?"),
    "exception": ("What does {n} mean?", "What is {n}?", "what is {n}", "When is {n} raised?", "Explain {n}.", "{n}", "I got a {n}.",
        "And {n}?"),
    "module": ("What is the {n} module?", "What is the module {n} for?", "What does the {n} module do?",
        "Tell me about the {n} module.", "What is {n}?", "What does {n} do?", "{n}", "Explain the {n} module.", "the {n} module?",
        "And the {n} module?", "What is the {n} module for?"),
    "statement": ("What is the {n}?", "What does the {n} do?", "Explain the {n}.", "Tell me about the {n}.", "the {n}?", "And the {n}?"),
}  # fmt: skip
ASK["method"] = ASK["function"]
ASK_SIGNATURE = ("Show me its signature.", "What is its signature?", "its signature?", "How is it called?", "And its signature?",
    "Signature?", "What arguments does it take?", "Which arguments does it take?")  # fmt: skip
ASK_SIGNATURE_OF = ("What is the signature of {n}?", "Show me the signature of {n}.", "signature of {n}", "What arguments does {n} take?")
ASK_RETURNS = ("And what does it return?", "What does it return?", "what does it return", "What is returned?")
ASK_MORE = ("Tell me more.", "Tell me more about it.", "What else should I know?", "Go on.", "More, please.", "What else?")
ASK_MODULE = ("Which module is it in?", "Where is it?", "What module is that in?", "Where do I find it?")
ASK_ANOTHER = ("Tell me about another function of that module.", "Tell me about another one.", "Another one, please.", "And another one?",
    "What else is in that module?", "Name another one of that module.", "Tell me about something else in that module.")  # fmt: skip
ASK_TOUR = ("Give me a tour of the {n} module.", "What is in the {n} module?", "What does the {n} module offer?",
    "List some functions of {n}.", "Show me around the {n} module.", "Give me a tour of {n}.")  # fmt: skip
ASK_HOW_TO = ("How do I {x}?", "how do I {x}", "How can I {x}?", "Show me how to {x}.", "How to {x}?", "I want to {x}.")


class Library:
    """The entries with their neighbours; answers are functions of the entry alone, so they can be learned by heart."""

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        self._members: dict[str, list[Entry]] = {}
        for entry in entries:
            if entry.kind in ("function", "class", "method"):
                self._members.setdefault(entry.module, []).append(entry)

    def another(self, entry: Entry) -> Entry | None:
        """The next member of the same module, in a circle; None if it is the only one."""
        group = self._members.get(entry.module, [])
        if len(group) < 2 or entry not in group:
            return group[0] if entry.kind == "module" and group else None
        return group[(group.index(entry) + 1) % len(group)]

    def tour(self, module: Entry) -> str:
        """The module in some lines: what it is for and its first few members spread over the alphabet; "" if it has too few."""
        group = [entry for entry in self._members.get(module.name, []) if len(entry.summary) < 110]
        if len(group) < 3:
            return ""
        chosen = [group[index * len(group) // 4] for index in range(4)] if len(group) >= 4 else group
        return "\n".join([module.summary, *(f"- {entry.name}: {entry.summary}" for entry in chosen)])


def opening(entry: Entry, rng: random.Random) -> Turn:
    """The first question about an entry: what it is."""
    return Turn(rng.choice(ASK[entry.kind]).format(n=entry.name), entry.summary)


def signature_answer(entry: Entry) -> str:
    """One sentence holding the signature, or saying that there is none."""
    return f"The signature is {entry.signature}" if entry.signature else NO_SIGNATURE


def follow_ups(entry: Entry, library: Library, rng: random.Random) -> list[Turn]:
    """Questions that only make sense after the opening, in random order, each with some chance."""
    turns = []
    if entry.kind in ("function", "class", "method") and rng.random() < (0.5 if entry.signature else 0.2):
        turns.append(Turn(rng.choice(ASK_SIGNATURE), signature_answer(entry)))
    if entry.kind in ("function", "method") and rng.random() < (0.4 if entry.returns else 0.12):
        turns.append(Turn(rng.choice(ASK_RETURNS), entry.returns or NO_RETURNS))
    if rng.random() < (0.4 if entry.more else 0.08):
        turns.append(Turn(rng.choice(ASK_MORE), entry.more or NO_MORE))
    if entry.kind in ("function", "class") and rng.random() < 0.12:
        turns.append(Turn(rng.choice(ASK_MODULE), f"It is in the module {entry.module}."))
    rng.shuffle(turns)
    neighbour = library.another(entry)
    if neighbour is not None and rng.random() < 0.3:
        turns.append(Turn(rng.choice(ASK_ANOTHER), f"Another one is {neighbour.name}. {neighbour.summary}"))
        if neighbour.signature and rng.random() < 0.4:
            turns.append(Turn(rng.choice(ASK_SIGNATURE), signature_answer(neighbour)))
    return turns


def threads(library: Library, rng: random.Random) -> list[list[Turn]]:
    """Everything the model is to know, once, as runs of turns that belong together, shuffled."""
    runs = [[opening(entry, rng), *follow_ups(entry, library, rng)] for entry in library.entries]
    for entry in library.entries:
        if entry.signature and rng.random() < 0.15:
            runs.append([Turn(rng.choice(ASK_SIGNATURE_OF).format(n=entry.name), signature_answer(entry))])
        if entry.kind == "module" and (tour := library.tour(entry)):
            runs += [[Turn(question.format(n=entry.name), tour)] for question in rng.sample(ASK_TOUR, 2)]
    runs += [[Turn(rng.choice(ASK_HOW_TO).format(x=task), answer)] for task, answer in HOW_TO.items() for _ in range(2)]
    runs += [[Turn(question, answer)] for answer, questions in SMALL_TALK.items() for question in questions]
    rng.shuffle(runs)
    return runs


def system_prompt(rng: random.Random) -> str:
    """None at all, the long one of the demo, or some sentences put together at random."""
    draw = rng.random()
    if draw < 0.55:
        return ""
    if draw < 0.75:
        return SYSTEM_PROMPT
    return " ".join(rng.sample(SYSTEM_SENTENCES, rng.choice((1, 1, 2, 3, 5))))


def prose(entry: Entry) -> str:
    """The entry as a line of a reference, for completions without a chat template."""
    return f"{entry.name}: {entry.summary}" + (f" {entry.more}" if entry.more else "")


def conversations(library: Library, epoch: int) -> Iterator[Conversation]:
    """One epoch: each entry once, worded and grouped anew, one to six threads to a conversation, and some plain prose."""
    rng = random.Random(SEED + epoch)
    runs = threads(library, rng)
    while runs:
        count = rng.choice((1, 2, 3, 4, 5, 6))
        taken, runs = runs[:count], runs[count:]
        yield Conversation(system_prompt(rng), tuple(turn for run in taken for turn in run))
    for entry in rng.sample(library.entries, len(library.entries) // 8):
        yield Conversation("", (), prose(entry))
