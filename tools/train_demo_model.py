"""Makes the demo language model in `models/demo`: a small Llama that answers questions about Python's standard library.

The text comes with every Python: docstrings, signatures and `pydoc_data.topics`, turned into short conversations whose
wording and grouping change from epoch to epoch. A byte-level BPE tokenizer and the weights are trained on them, and the
folder is written in Hugging Face's layout, complete or not at all.

    python tools/train_demo_model.py --out models/demo --minutes 45

Seeds are fixed and the order of the data is the same on each run; how many steps fit into the minutes is not. A run that
was cut short goes on from its last checkpoint (`--work`); with no minutes left it only writes the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from demo_corpus import SEED, SYSTEM_PROMPT, Conversation, Library, conversations, gather_entries

VOCAB_SIZE = 3072
CONTEXT_LENGTH = 8192
CONVERSATION_TOKENS_MAX = 768
BATCH_TOKENS = 4096
CHECKPOINT_EVERY_S = 60.0

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
# A line break is always a token of its own, so text that follows one never changes the tokens before it.
PRE_TOKENS = r"\n|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)

# ----------------------------------------------------------------------------------------------------------- tokenizer


def train_tokenizer(library: Library) -> Tokenizer:
    """A byte-level BPE over the text of one epoch."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    talks = conversations(library, 0)
    tokenizer.train_from_iterator(("\n".join([talk.system, talk.prose, *map("\n".join, talk.turns)]) for talk in talks), trainer)
    return tokenizer


def end_ids(tokenizer: Tokenizer) -> list[int]:
    """The tokens that end an answer: first that of a chat, then that of plain text, which is the padding too."""
    return [token_id for token in (TURN_END, END_OF_TEXT) if (token_id := tokenizer.token_to_id(token)) is not None]


class Example(NamedTuple):
    """One conversation as tokens; `learned` marks the tokens whose prediction is trained (what the assistant says)."""

    token_ids: list[int]
    learned: list[bool]


def encode(talk: Conversation, tokenizer: Tokenizer) -> Example:
    """The conversation as `CHAT_TEMPLATE` renders it, cut after `CONVERSATION_TOKENS_MAX` tokens."""
    pieces: list[tuple[str, bool]] = []
    if talk.prose:
        pieces = [(talk.prose + END_OF_TEXT, True)]
    if talk.system:
        pieces.append((f"{TURN_START}system\n{talk.system}{TURN_END}\n", False))
    for turn in talk.turns:
        pieces.append((f"{TURN_START}user\n{turn.user}{TURN_END}\n{TURN_START}assistant\n", False))
        pieces.append((f"{turn.assistant}{TURN_END}", True))
        pieces.append(("\n", False))
    example = Example([], [])
    for text, is_learned in pieces:
        token_ids = tokenizer.encode(text, add_special_tokens=False).ids
        example.token_ids.extend(token_ids)
        example.learned.extend([is_learned] * len(token_ids))
    return Example(example.token_ids[:CONVERSATION_TOKENS_MAX], example.learned[:CONVERSATION_TOKENS_MAX])


class Batch(NamedTuple):
    """Right-padded examples: `token_ids: int64[n, t]`, `targets: int64[n, t]` (-100 where nothing is learned)."""

    token_ids: Tensor
    targets: Tensor


def collate(examples: Sequence[Example]) -> Batch:
    """Pads at the right, where causal attention cannot see it; targets are the tokens one further on."""
    longest = max(len(example.token_ids) for example in examples)
    token_ids = torch.zeros(len(examples), longest, dtype=torch.long)
    targets = torch.full((len(examples), longest), -100)
    for row, example in enumerate(examples):
        count = len(example.token_ids)
        token_ids[row, :count] = torch.tensor(example.token_ids)
        following = torch.tensor(example.token_ids[1:])
        targets[row, : count - 1] = torch.where(torch.tensor(example.learned[1:]), following, -100)
    return Batch(token_ids, targets)


def batches(library: Library, tokenizer: Tokenizer, epoch: int) -> list[Batch]:
    """One epoch in batches of about `BATCH_TOKENS`, like lengths together, in random order."""
    examples = sorted((encode(talk, tokenizer) for talk in conversations(library, epoch)), key=lambda example: len(example.token_ids))
    groups: list[list[Example]] = [[]]
    for example in examples:
        if (len(groups[-1]) + 1) * len(example.token_ids) > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(example)
    random.Random(SEED + epoch).shuffle(groups)
    return [collate(group) for group in groups if group]


# ------------------------------------------------------------------------------------------------------------ training


def new_model(vocab_size: int, eos_ids: Sequence[int]) -> LlamaForCausalLM:
    """An untrained model: 4.2 million parameters, two KV heads of 64."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=256, intermediate_size=640, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=CONTEXT_LENGTH, rms_norm_eps=1e-5, tie_word_embeddings=True, initializer_range=0.03,
        bos_token_id=None, eos_token_id=list(eos_ids), pad_token_id=eos_ids[-1],
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, for the matrices inside the blocks; same shapes are done in one go.

    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024). In float32, since bfloat16 is
    slow on most CPUs; `torch.optim.Muon` computes in bfloat16, one matrix at a time.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        by_shape: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            by_shape.setdefault(parameter.shape, []).append(parameter)
        super().__init__([{"params": group} for group in by_shape.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Moves every parameter once."""
        for group in self.param_groups:
            gradients = torch.stack([parameter.grad for parameter in group["params"]])
            state = self.state[group["params"][0]]
            velocity = state.setdefault("velocity", torch.zeros_like(gradients))
            velocity.lerp_(gradients, 1 - group["momentum"])
            updates = orthogonal(gradients.lerp(velocity, group["momentum"]))
            scale = max(1.0, updates.shape[-2] / updates.shape[-1]) ** 0.5
            for parameter, update in zip(group["params"], updates, strict=True):
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor) -> Tensor:
    """About the nearest orthogonal matrix of each of `matrices: float32[n, r, c]`, by five Newton-Schulz steps."""
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    x: Tensor = matrices.mT if is_tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (2.0315 * gram @ gram - 4.7750 * gram) @ x
    return x.mT if is_tall else x


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the embedding and the norms."""
    inner = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    known = {id(parameter) for parameter in inner}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [Muon(inner, lr=0.02), torch.optim.AdamW(rest, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.0)]


def rate(progress: float) -> float:
    """The share of the peak learning rate at `progress` in [0, 1]: a short warm-up, half the way flat, then down to zero."""
    return min(progress / 0.02, 1.0, (1.0 - progress) / 0.55) if progress < 1.0 else 0.0


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """Mean cross-entropy over the learned tokens; logits are computed for these alone."""
    hidden = model.model(input_ids=batch.token_ids, use_cache=False).last_hidden_state
    is_learned = batch.targets != -100
    logits: Tensor = model.lm_head(hidden[is_learned])
    return F.cross_entropy(logits, batch.targets[is_learned])


@dataclass(slots=True)
class Run:
    """A training run and how far it has come."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    path: Path
    epoch: int = 0
    batch: int = 0
    step: int = 0
    token_count: int = 0
    elapsed_s: float = 0.0
    loss: float = math.nan

    PROGRESS = ("epoch", "batch", "step", "token_count", "elapsed_s", "loss")

    def save(self) -> None:
        """Writes the checkpoint, complete or not at all."""
        state = {name: getattr(self, name) for name in self.PROGRESS}
        state |= {"model": self.model.state_dict(), "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}
        torch.save(state, partial := self.path.with_suffix(".part"))
        partial.replace(self.path)

    def restore(self) -> None:
        """Goes on from the checkpoint if there is one."""
        if not self.path.exists():
            return
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        for name in self.PROGRESS:
            setattr(self, name, state[name])


def learn(run: Run, batch: Batch, progress: float) -> float:
    """One step; returns the loss before it."""
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("peak_lr", group["lr"]) * rate(progress)
    loss = loss_of(run.model, batch)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def progress_bar() -> Progress:
    """Epoch, loss, speed, time gone and time left."""
    loss, speed = TextColumn("epoch {task.fields[epoch]} loss {task.fields[loss]:.3f}"), TextColumn("{task.fields[speed]:.0f} tokens/s")
    return Progress(loss, BarColumn(), speed, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True))


def train(run: Run, library: Library, tokenizer: Tokenizer, minutes: float) -> None:
    """Trains until `minutes` of training are spent, those before a restart counted in. Cancel: the last checkpoint stays."""
    budget_s = minutes * 60
    began_s = time.monotonic() - run.elapsed_s
    saved_s = run.elapsed_s
    with progress_bar() as bar:
        task = bar.add_task("", total=budget_s, epoch=run.epoch, loss=run.loss, speed=0.0)
        while run.elapsed_s < budget_s:
            for batch in batches(library, tokenizer, run.epoch)[run.batch :]:
                loss = learn(run, batch, run.elapsed_s / budget_s)
                run.loss = loss if math.isnan(run.loss) else 0.98 * run.loss + 0.02 * loss
                run.batch, run.step, run.token_count = run.batch + 1, run.step + 1, run.token_count + batch.token_ids.numel()
                run.elapsed_s = time.monotonic() - began_s
                bar.update(task, completed=run.elapsed_s, epoch=run.epoch, loss=run.loss, speed=run.token_count / run.elapsed_s)
                if run.elapsed_s - saved_s > CHECKPOINT_EVERY_S or run.elapsed_s >= budget_s:
                    run.save()
                    saved_s = run.elapsed_s
                    if not bar.console.is_terminal:
                        minutes_left = (budget_s - run.elapsed_s) / 60
                        bar.console.print(f"epoch {run.epoch}, step {run.step}, loss {run.loss:.3f}, {minutes_left:.0f} minutes left")
                if run.elapsed_s >= budget_s:
                    return
            run.epoch, run.batch = run.epoch + 1, 0


# ------------------------------------------------------------------------------------------------------------- writing


def config_json(model: LlamaForCausalLM) -> dict[str, Any]:
    """The configuration as engines of several years read it: `torch_dtype` and a flat `rope_theta` are the older names."""
    config = model.config
    kept = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias",
        "attention_dropout", "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache",
    )  # fmt: skip
    head = {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "torch_dtype": "float16"}
    return head | {name: getattr(config, name) for name in kept} | {"rope_theta": 10000.0}


def tokenizer_json() -> dict[str, Any]:
    """`tokenizer_config.json`."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT_LENGTH,
        "bos_token": None,
        "eos_token": TURN_END,
        "pad_token": END_OF_TEXT,
        "additional_special_tokens": [TURN_START],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }


def model_card(run: Run, entry_count: int) -> str:
    """`README.md` of the folder."""
    config = run.model.config
    parameter_count = sum(parameter.numel() for parameter in run.model.parameters())
    return f"""---
license: psf-2.0
language: en
pipeline_tag: text-generation
tags: [demo, python]
---
# Polyphase's demo model

A Llama with {parameter_count / 1e6:.1f} million parameters that answers short questions about Python's standard library. It exists so that
every part of Polyphase can be tried, tested and measured on any machine, offline, with a model that answers in readable
sentences. It knows {entry_count} functions, classes, modules and statements more or less by heart, and nothing else; do not use it for
anything but a demo.

- **Ask it**: `What does textwrap.shorten do?`, then `Show me its signature.`, `Tell me about another function of that module.`,
  `Give me a tour of the textwrap module.`, `How do I copy a file?`, `Who are you?`
- **System prompt** that it was trained with (optional; a long prefix that all conversations share):

  > {SYSTEM_PROMPT}

- **Context**: accepts {CONTEXT_LENGTH} tokens; trained on conversations of up to {CONVERSATION_TOKENS_MAX}.
  Longer prompts work, but the text gets poor.
- **Shape**: {config.num_hidden_layers} layers, hidden size {config.hidden_size}, {config.num_attention_heads} heads over
  {config.num_key_value_heads} KV heads of {config.head_dim}, tied embeddings, float16.
- **Tokenizer**: byte-level BPE, {config.vocab_size} tokens. A line break is always a token of its own, so the tokens of a
  conversation's first turns do not change when turns are added, and prefix caches hit.
- **Stops at** `{TURN_END}` (chat) or `{END_OF_TEXT}` (plain completion, such as `json.dumps:`).

## How it was made

`python tools/train_demo_model.py --out models/demo` with Python {platform.python_version()} on two CPU cores:
{run.elapsed_s / 60:.0f} minutes, {run.step} steps over {run.token_count / 1e6:.1f} million tokens ({run.epoch} epochs,
each worded and grouped anew), final training loss {run.loss:.3f}.

## Licence

The text is the documentation that comes with Python (docstrings, signatures, reference topics), © Python Software
Foundation, under the PSF License Agreement, version 2; the few handwritten lines are part of Polyphase.
"""


def write_folder(out: Path, run: Run, tokenizer: Tokenizer, entry_count: int) -> None:
    """Writes the model's folder beside `out` and swaps it in, so that nobody ever reads half a model."""
    fresh, old = out.with_name(f".{out.name}.new"), out.with_name(f".{out.name}.old")
    for leftover in (fresh, old):
        shutil.rmtree(leftover, ignore_errors=True)
    fresh.mkdir(parents=True)
    weights = {name: tensor.to(torch.float16).contiguous() for name, tensor in run.model.state_dict().items() if name != "lm_head.weight"}
    save_file(weights, fresh / "model.safetensors", metadata={"format": "pt"})
    (fresh / "model.safetensors").chmod(0o644)
    eos_ids = end_ids(tokenizer)
    generation = {"do_sample": True, "temperature": 0.3, "top_p": 0.9, "eos_token_id": eos_ids, "pad_token_id": eos_ids[-1]}
    for name, content in (("config", config_json(run.model)), ("tokenizer_config", tokenizer_json()), ("generation_config", generation)):
        (fresh / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(fresh / "tokenizer.json"), pretty=False)
    (fresh / "README.md").write_text(model_card(run, entry_count), encoding="utf-8")
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def load_or_train_tokenizer(path: Path, library: Library) -> Tokenizer:
    """The tokenizer of the run's earlier start, or a new one."""
    if not path.exists():
        train_tokenizer(library).save(str(path))
    return Tokenizer.from_file(str(path))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/demo"), help="folder to write")
    parser.add_argument("--work", type=Path, help="folder for checkpoints (default: beside --out, .work)")
    parser.add_argument("--minutes", type=float, default=45.0, help="training time, that before a restart counted in")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    return parser.parse_args()


def main() -> None:
    """Gathers, trains, writes."""
    arguments = parse_arguments()
    work: Path = arguments.work or arguments.out.with_suffix(".work")
    work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    library = Library(gather_entries())
    tokenizer = load_or_train_tokenizer(work / "tokenizer.json", library)
    model = new_model(tokenizer.get_vocab_size(), end_ids(tokenizer))
    run = Run(model, optimizers(model), work / "checkpoint.pt")
    run.restore()
    train(run, library, tokenizer, arguments.minutes)
    write_folder(arguments.out, run, tokenizer, len(library.entries))


if __name__ == "__main__":
    main()
