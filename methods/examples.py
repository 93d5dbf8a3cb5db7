"""What training reads: prompts with responses, or windows of text; and a batch of either.

A window is a response without a prompt: every token after the first is learned. Both become a `Batch`, so that a loss
is written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from harness.errors import ConfigError, RunError
from harness.json_lines import json_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from harness.corpus import Corpus


@dataclass(frozen=True)
class Example:
    """A text that is continued.

    prompt: token ids that are read and not learned. response: token ids that are learned, the end mark included where
    the text ended there. weight: of every token of the response in the loss.
    """

    prompt: Sequence[int]
    response: Sequence[int]
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


Data = Tensor | Sequence[Example]  # windows of ids [S, T], or examples


@dataclass(frozen=True)
class Batch:
    """Texts side by side, padded on the right.

    tokens: ids [B, T]. attention: [B, T], 1 where a token is read and 0 on padding. weights: [B, T-1] float32, what the
    prediction of tokens[:, 1:] counts; 0 on prompts and padding. rows: [B], numbers of the texts in the data set.
    more: further tensors [B, ...] that a method adds when it rewrites a batch.
    known_padded: `padded`, where it is known without looking.
    """

    tokens: Tensor
    attention: Tensor
    weights: Tensor
    rows: Tensor
    more: dict[str, Tensor] = field(default_factory=dict)
    known_padded: bool | None = None

    @classmethod
    def of_windows(cls, tokens: Tensor, rows: Tensor | None = None) -> Batch:
        """Windows of ids [B, T], every token of which is learned but the first."""
        rows = torch.arange(len(tokens), device=tokens.device) if rows is None else rows
        weights = torch.ones(len(tokens), tokens.shape[1] - 1, device=tokens.device)
        return cls(tokens, torch.ones_like(tokens), weights, rows)

    @classmethod
    def of_examples(cls, examples: Sequence[Example], rows: Sequence[int] | None = None, pad: int = 0) -> Batch:
        """Examples of any lengths, padded with the id `pad`. A response needs something before it: see Raises.

        Raises RunError for an example of one token or with an empty response.
        """
        width = max(len(example) for example in examples)
        tokens = torch.full((len(examples), width), pad, dtype=torch.long)
        attention = torch.zeros_like(tokens)
        weights = torch.zeros(len(examples), width - 1)
        for row, example in enumerate(examples):
            start, length = len(example.prompt), len(example)
            if length < 2 or not len(example.response):
                raise RunError(
                    f"example {row if rows is None else rows[row]} has no response to learn after its prompt"
                )
            tokens[row, :length] = torch.as_tensor([*example.prompt, *example.response])
            attention[row, :length] = 1
            weights[row, max(start - 1, 0) : length - 1] = example.weight
        return cls(tokens, attention, weights, torch.as_tensor(range(len(examples)) if rows is None else rows))

    @property
    def response(self) -> Tensor:
        """Which predictions are learned: bool [B, T-1]."""
        return self.weights > 0

    @property
    def padded(self) -> bool:
        """Whether a row is shorter than the batch."""
        return not bool(self.attention.all()) if self.known_padded is None else self.known_padded

    def to(self, device: torch.device | str) -> Batch:
        """The same on another device."""
        moved = {key: value.to(device) for key, value in self.as_dict().items()}
        return Batch.from_dict(moved)

    def as_dict(self) -> dict[str, Tensor]:
        """Its tensors by name, for a data loader."""
        return {
            "tokens": self.tokens,
            "attention": self.attention,
            "weights": self.weights,
            "rows": self.rows,
            **self.more,
        }

    @classmethod
    def from_dict(cls, tensors: dict[str, Tensor]) -> Batch:
        """The batch of `as_dict`."""
        own = {key: tensors[key] for key in ("tokens", "attention", "weights", "rows")}
        return cls(**own, more={key: value for key, value in tensors.items() if key not in own})

    def with_sequence_means(self) -> Batch:
        """The same with weights by which every response counts once, however long: w / number of its tokens."""
        lengths = self.response.sum(1, keepdim=True).clamp(min=1)
        return replace(self, weights=self.weights / lengths)


def collated(data: Data, rows: Sequence[int], pad: int) -> Batch:
    """The batch of some rows of a data set."""
    if isinstance(data, Tensor):
        return Batch.of_windows(data[list(rows)], torch.as_tensor(rows))
    return Batch.of_examples([data[row] for row in rows], rows, pad)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """An id to pad with; it is never read, so the end mark does for a tokenizer that has none."""
    for known in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if known is not None:
            return known
    return 0


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end a response."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


# ------------------------------------------------------------------------------------------------ where they come from


class Texts(NamedTuple):
    """What a method trains on, and what it looks at meanwhile without training on it."""

    train: Data
    held_out: Data


class TextSource(Protocol):
    """Texts to train on."""

    def read(self, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, generator: torch.Generator) -> Texts:
        """The texts, in an order that depends on the seed alone. Raises RunError when there is none."""


@dataclass(frozen=True)
class Windows:
    """Windows of the calibration text, at random places; held out: its last twentieth.

    samples: how many. window: how many tokens each. held_out: how many windows to look at.
    """

    samples: int
    window: int
    held_out: int = 8

    def __post_init__(self) -> None:
        for name, least in (("samples", 1), ("window", 2), ("held_out", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"examples.{name}={getattr(self, name)}: must be at least {least}")

    def read(self, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, generator: torch.Generator) -> Texts:
        """See TextSource."""
        train = corpus.training_windows(tokenizer, generator, self.samples, self.window)
        return Texts(train, corpus.held_out_windows(tokenizer, self.held_out, self.window))


@dataclass(frozen=True)
class Continuations:
    """The calibration text itself: the beginning of a window is the prompt, what follows it the response.

    samples: how many. prompt_tokens and response_tokens: how long the two parts are. held_out: how many to look at,
    from the last twentieth of the text.
    """

    samples: int
    prompt_tokens: int
    response_tokens: int
    held_out: int = 8

    def __post_init__(self) -> None:
        for name in ("samples", "prompt_tokens", "response_tokens", "held_out"):
            if getattr(self, name) < 1:
                raise ConfigError(f"examples.{name}={getattr(self, name)}: must be at least 1")

    def read(self, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, generator: torch.Generator) -> Texts:
        """See TextSource."""
        windows = Windows(self.samples, self.prompt_tokens + self.response_tokens, self.held_out)
        return Texts(*(self._split(part.tolist()) for part in windows.read(tokenizer, corpus, generator)))

    def _split(self, windows: list[list[int]]) -> list[Example]:
        return [Example(window[: self.prompt_tokens], window[self.prompt_tokens :]) for window in windows]


@dataclass(frozen=True)
class ExampleFile:
    """One JSON object a line (.jsonl, or .jsonl.xz), whose fields make a prompt and a response.

    prompt and response: templates of the fields in braces, "Question: {question}\\nAnswer:". chat: put the prompt into
    the tokenizer's chat template as the user's turn. maximum_tokens: longer examples are left out (how many is said).
    broken: what to do with a line that is no JSON object: "refuse" or "skip" it, with its number. limit: read so many
    at most. held_out: the last so many are only looked at.
    """

    path: str
    prompt: str
    response: str
    chat: bool = False
    maximum_tokens: int = 512
    broken: Literal["refuse", "skip"] = "refuse"
    limit: int | None = None
    held_out: int = 16

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("examples=file needs a file: method.examples.path=FILE.jsonl")
        if not Path(self.path).is_file():
            raise ConfigError(f"method.examples.path={self.path}: there is no such file")
        if self.maximum_tokens < 2:
            raise ConfigError(f"method.examples.maximum_tokens={self.maximum_tokens}: must be at least 2")
        if self.held_out < 1:
            raise ConfigError(f"method.examples.held_out={self.held_out}: must be at least 1")
        if self.broken not in ("refuse", "skip"):
            raise ConfigError(f"method.examples.broken={self.broken}: choose refuse or skip")

    def read(self, tokenizer: PreTrainedTokenizerBase, corpus: Corpus, generator: torch.Generator) -> Texts:
        """See TextSource."""
        examples, long = [], 0
        for row in json_rows(Path(self.path), self.broken):
            try:
                prompt, response = self.prompt.format(**row), self.response.format(**row)
            except (KeyError, IndexError, ValueError) as error:
                raise RunError(
                    f"{self.path}: no field {error} in a line with the fields {', '.join(sorted(row))}; set "
                    "method.examples.prompt and method.examples.response to templates of those"
                ) from error
            example = tokenized(tokenizer, prompt, response, self.chat)
            if len(example) > self.maximum_tokens:
                long += 1
                continue
            examples.append(example)
            if len(examples) == self.limit:
                break
        if len(examples) <= self.held_out:
            raise RunError(
                f"{self.path}: {len(examples)} examples of at most {self.maximum_tokens} tokens in it ({long} are "
                f"longer), not more than the {self.held_out} that are held out; raise method.examples.maximum_tokens "
                "or choose another file"
            )
        if long:
            print(f"{self.path}: {long} examples of more than {self.maximum_tokens} tokens left out", flush=True)
        return Texts(examples[: -self.held_out], examples[-self.held_out :])


def tokenized(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, chat: bool = False) -> Example:
    """A prompt and a response as ids; the response ends with the tokenizer's end mark."""
    if chat:
        turns = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    first = tokenizer(prompt, add_special_tokens=not chat)["input_ids"]
    second = tokenizer(response, add_special_tokens=False)["input_ids"]
    return Example(first, [*second, *end_ids(tokenizer)[:1]])
