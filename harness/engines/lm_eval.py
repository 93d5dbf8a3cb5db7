"""Our engine as a model of lm-evaluation-harness, so that its tasks run on whatever our engine runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from harness.decoding import POSITIONS_UNLIMITED, batches, complete_ids, padded
from harness.errors import RunError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor

    from harness.method import LanguageModel, Progress

Request = tuple[Any, list[int], list[int]]  # (texts, context ids, continuation ids)

NEW_TOKENS = 256  # longest answer where a task names none; lm-eval's default


class EngineLM(TemplateLM):
    """Scores continuations and generates answers through `lm.engine`, in batches of similar length."""

    def __init__(self, lm: LanguageModel, batch: int, progress: Progress) -> None:
        super().__init__()
        self.tokenizer = lm.tokenizer
        self._lm = lm
        self._batch = batch
        self._progress = progress
        self._encoded: dict[str, list[int]] = {}  # of the requests at hand

    @property
    def eot_token_id(self) -> int:
        """Ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands before a text without context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else begin

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return getattr(self._lm.engine, "context_tokens", None) or POSITIONS_UNLIMITED

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in lm-eval's own caches."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the model's template writes it."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. Special tokens as the tokenizer adds them, unless a chat template already wrote the first one."""
        if add_special_tokens is None:
            if string in self._encoded:
                return self._encoded[string]
            add_special_tokens = self._wants_special_tokens(string)
        return self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)["input_ids"]

    def _wants_special_tokens(self, string: str) -> bool:
        begin = self.tokenizer.bos_token
        return not (begin and string.startswith(begin))

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-probability of the continuation in nats, whether greedy decoding would produce it) per request."""
        pairs = [request.args for request in requests]
        self._encode_at_once({text for before, after in pairs for text in (before + after, before.rstrip())})
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        finally:
            self._encoded = {}

    def _encode_at_once(self, texts: set[str]) -> None:
        """Keep the ids of the texts that pairs will ask for one by one, each several times: calls outlast encoding."""
        for special in (True, False):
            some = [text for text in sorted(texts) if text and self._wants_special_tokens(text) is special]
            if some:
                ids = self.tokenizer(some, add_special_tokens=special, verbose=False)["input_ids"]
                self._encoded |= dict(zip(some, ids, strict=True))

    @torch.inference_mode()
    def _loglikelihood_tokens(self, requests: list[Request], **_: Any) -> list[tuple[float, bool]]:
        results: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        lengths = [len(context) + len(continuation) for _, context, continuation in requests]
        for batch in self._batches(lengths, "questions"):
            spans = [self._span(requests[index]) for index in batch]
            hidden = self._lm.engine.hidden(padded([ids for ids, _ in spans], left=False)[0])
            predicting = torch.cat([row[len(ids) - n : len(ids)] for row, (ids, n) in zip(hidden, spans, strict=True)])
            targets = [requests[index][2][-n:] for index, (_, n) in zip(batch, spans, strict=True)]
            scores, greedy = self._continuation(predicting, torch.tensor([id for ids in targets for id in ids]))
            scores, greedy = scores.cpu(), greedy.cpu()  # once a batch: every look at a GPU makes it wait
            counts = [n for _, n in spans]
            for index, own, same in zip(batch, scores.split(counts), greedy.split(counts), strict=True):
                results[index] = (float(own.sum()), bool(same.all()))
        return results

    def _continuation(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target in nats, and whether it is the likeliest: [N, H], [N] -> [N], [N]."""
        scores, greedy = [], []
        some = self._lm.engine.logit_rows
        for rows, ids in zip(hidden.split(some), targets.to(hidden.device).split(some), strict=True):
            logits = self._lm.engine.logits(rows)
            scores.append(logits.log_softmax(-1).gather(1, ids[:, None])[:, 0])
            greedy.append(logits.argmax(-1) == ids)
        return torch.cat(scores), torch.cat(greedy)

    def _span(self, request: Request) -> tuple[list[int], int]:
        """The ids that the model reads (all but the last, cut at the left to fit) and how many of them predict."""
        _, context, continuation = request
        ids = (context + continuation)[-(self.max_length + 1) :]
        return ids[:-1], min(len(continuation), len(ids) - 1)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability of whole texts in nats, each cut into windows that predict every token once."""
        windows = [
            [
                (None, *make_disjoint_window(pair))
                for pair in get_rolling_token_windows(
                    self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, context_len=1
                )
            ]
            for request in requests
        ]
        scores = iter(self._loglikelihood_tokens([window for text in windows for window in text]))
        return [sum(next(scores)[0] for _ in text) for text in windows]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Greedy answers up to the first stop sequence, which is left out."""
        answers = [""] * len(requests)
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        settings = [_settings(request.args[1]) for request in requests]
        for batch in self._batches([len(prompt) for prompt in prompts], "answers"):
            limit = min(max(settings[index][1] for index in batch), self.max_length - 1)
            cut = [prompts[index][-(self.max_length - limit) :] for index in batch]
            written = complete_ids(self._lm, cut, [settings[index] for index in batch], limit)
            for index, completion in zip(batch, written, strict=True):
                answers[index] = completion.text
        return answers

    def _batches(self, lengths: Sequence[int], what: str) -> Iterator[list[int]]:
        return batches(lengths, self._batch, self._progress, what)


def _settings(arguments: dict[str, Any]) -> tuple[list[str], int]:
    """(stop sequences, most new tokens) of a generation task. Raises RunError for a task that wants sampling."""
    if arguments.get("do_sample"):
        raise RunError("this task samples its answers (generation_kwargs.do_sample); the engine decodes greedily only")
    until = arguments.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    return [stop for stop in stops if stop], int(arguments.get("max_gen_toks") or NEW_TOKENS)
