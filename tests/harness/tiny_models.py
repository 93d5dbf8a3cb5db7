"""Tiny random models and tokenizers for the tests of engines and probes."""

from __future__ import annotations

import torch

from harness.engines.transformers import TransformersEngine
from harness.environment import Hardware
from harness.evaluation import Context
from harness.method import LanguageModel
from harness.progress import NoProgress

VOCABULARY = 300
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
}


def causal_model(kind: str = "llama", seed: int = 0, **changes):
    """A random model of an architecture by its transformers name, large enough weights to have opinions."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **(SHAPE | {"initializer_range": 0.2, "pad_token_id": 0} | changes))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config)


def byte_tokenizer():
    """One token per byte, made without any file: ids below 256 are bytes, 256 ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<end>": 256}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def language_model(seed: int = 0, **changes) -> LanguageModel:
    module = causal_model(seed=seed, **changes)
    return LanguageModel(module, byte_tokenizer(), TransformersEngine(module), torch.float16)


def token_ids(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, 256, (rows, columns), generator=torch.Generator().manual_seed(seed))


class Text:
    """A corpus of given text, with the methods of a corpus that probes use."""

    name = evaluation_name = "made-up text"

    def __init__(self, text: str) -> None:
        self.text = text

    def evaluation_tokens(self, tokenizer) -> torch.Tensor:
        return torch.tensor(tokenizer(self.text)["input_ids"])


def context(folder, text: str = "", dense=None, **hardware) -> Context:
    """A probe's context whose files live under `folder`; `dense` is the samples folder of the dense run."""
    return Context(
        corpus=Text(text),
        hardware=Hardware("cpu", threads=1, **hardware),
        artifact=folder / "artifact",
        samples=folder / "samples",
        reference=dense,
        cache=folder / "cache",
        seed=0,
        progress=NoProgress(),
    )
