"""Memory, split: bytes on disk, bits per weight, bytes loaded, KV cache per token, peak while running.

One "memory" number misleads: a method may shrink the file and not what is loaded, or the weights and not the cache.
Everything is counted from outside, on the files that were saved and the module that was loaded from them.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch

from harness import artifact
from harness.engines.placement import devices_of
from harness.environment import peak_resident_bytes, resident_bytes
from harness.errors import ConfigError
from harness.records import Measurement

if TYPE_CHECKING:
    from torch import nn

    from harness.evaluation import Context, Stage
    from harness.method import LanguageModel

RESET_PEAK = "5"  # what Linux takes in clear_refs to forget the largest resident size


@dataclass(frozen=True)
class Footprint:
    """Sizes of a model at rest and while it reads a prompt and answers.

    prompt_tokens, new_tokens: of the one sequence whose peak memory is measured.
    """

    prompt_tokens: int
    new_tokens: int

    stage: ClassVar[Stage] = "time"
    compares: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "new_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"footprint {name}={getattr(self, name)}: must be at least 1")

    def measure(self, lm: LanguageModel, context: Context) -> Iterable[Measurement]:
        """Bytes and bits, from the disk upwards."""
        dtype_name = context.hardware.resolved_decoding_dtype()
        dtype = getattr(torch, dtype_name)
        description = artifact.read_description(context.artifact)
        sizes = artifact.tensor_bytes(context.artifact)
        parameters = description["parameters"]

        yield _bytes("stored_bytes", artifact.stored_bytes(context.artifact), "weight files on disk")
        yield _bits(
            "effective_bits_per_weight", linear_bits(sizes, description["linears"]), "linears in decoder blocks"
        )
        yield _bits("model_bits_per_weight", 8 * sum(sizes.values()) / parameters, "all parameters")
        yield Measurement("parameters", parameters, "parameters", "all of the model, tied ones once", "lower")
        dense = f"{parameters * dtype.itemsize} as a dense model; {lm.engine.kernels()}"
        elsewhere = getattr(lm.engine, "loaded_bytes", None)  # of an engine that holds the weights itself
        loaded = loaded_bytes(lm.module) if elsewhere is None else elsewhere
        yield _bytes("loaded_weight_bytes", loaded, f"ready to decode, {dtype_name}", dense)
        if elsewhere is None:
            yield from self._shares(lm.module, dtype_name)
        cache = lm.engine.kv_cache_bytes_per_token(dtype)
        predicted = f"{analytic_kv_bytes_per_token(lm.module, dtype)} from the model's shape"
        yield _bytes("kv_cache_bytes_per_token", cache, f"one sequence, {dtype_name}", predicted)
        if elsewhere is None:
            yield from self._peaks(lm, dtype_name)
        else:
            yield from self._needed_and_reserved(lm, loaded, cache, dtype_name)

    def _needed_and_reserved(
        self, lm: LanguageModel, loaded: int, cache: float, dtype_name: str
    ) -> Iterable[Measurement]:
        """An engine that takes its memory at its start: what the workload needs of it, and what it took."""
        tokens = self.prompt_tokens + self.new_tokens
        yield _bytes("needed_bytes", loaded + cache * tokens, f"weights and {tokens} cached tokens, {dtype_name}")
        reserved, room = lm.engine.reserved_cache_bytes, lm.engine.reserved_cache_tokens
        note = f"room for {room} tokens; {lm.engine.memory_note}"
        yield _bytes("reserved_bytes", loaded + reserved, f"weights and reserved cache, {dtype_name}", note)

    def _shares(self, module: nn.Module, dtype_name: str) -> Iterable[Measurement]:
        """What each device holds of the weights, where several do."""
        devices = devices_of(module)
        if len(devices) > 1:
            for device, held in loaded_by_device(module).items():
                yield _bytes("device_weight_bytes", held, f"{device}, {dtype_name}")

    def _peaks(self, lm: LanguageModel, dtype_name: str) -> Iterable[Measurement]:
        """Peak memory above idle, once for the prompt alone and once with answering."""
        generator = torch.Generator().manual_seed(0)
        vocabulary = lm.module.get_input_embeddings().num_embeddings
        prompt = torch.randint(vocabulary, (1, self.prompt_tokens), generator=generator)
        for name, new_tokens in (("prefill", 1), ("prefill and decode", self.new_tokens + 1)):
            steps = f", {new_tokens} new" if new_tokens > 1 else ""
            on = f"{name} above idle, batch 1, prompt {self.prompt_tokens}{steps}, {dtype_name}"

            def answer(count: int = new_tokens) -> None:
                for _ in lm.engine.generate(prompt, count):
                    pass

            answer()  # libraries allocate their work space once
            lm.engine.forget_requests()  # a static cache and a graph are made for a request: they count
            devices = devices_of(lm.module)
            peaks = peaks_by_device(answer, devices)
            note = "this system does not say" if peaks is None else ""
            if len(devices) > 1:
                note = f"sum of the peaks of {len(devices)} devices"
            yield Measurement(
                "peak_memory_bytes", None if peaks is None else sum(peaks), "bytes", on, "lower", note=note
            )
            if peaks is not None and len(devices) > 1:
                for device, peak in zip(devices, peaks, strict=True):
                    yield _bytes("device_peak_bytes", peak, f"{device}, {on}")


def linear_bits(sizes: dict[str, int], linears: dict[str, list[int]]) -> float:
    """Bits per weight of the linears [out, in] by name: every stored byte of them but the biases.

    sizes: bytes of each stored tensor.
    """
    weights = sum(rows * columns for rows, columns in linears.values())
    stored = 0
    for name, size in sizes.items():
        owner, _, part = name.rpartition(".")
        if part != "bias" and _owner(owner, linears):
            stored += size
    return 8 * stored / weights


def _owner(name: str, linears: dict[str, list[int]]) -> bool:
    """Whether a tensor's module is one of the linears or lies inside one."""
    while name:
        if name in linears:
            return True
        name = name.rpartition(".")[0]
    return False


def loaded_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers in memory; what is shared counts once."""
    return sum(loaded_by_device(module).values())


def loaded_by_device(module: nn.Module) -> dict[torch.device, int]:
    """The same for each device."""
    storages = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        storage = tensor.untyped_storage()
        storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    held = Counter()
    for (device, _), size in storages.items():
        held[device] += size
    return dict(held)


def analytic_kv_bytes_per_token(module: nn.Module, dtype: torch.dtype) -> int:
    """Keys and values of one token in every layer, from the model's shape."""
    config = module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    uneven = getattr(config, "uneven_layers", None) or [{}] * config.num_hidden_layers
    return 2 * sum(layer.get("key_value_heads", heads) for layer in uneven) * width * dtype.itemsize


def peak_bytes(work: Callable[[], None], *devices: torch.device) -> int | None:
    """How far memory rises above what is held now while `work` runs; None where the system does not say.

    Of several devices the sum of their peaks, which need not come at one time.
    """
    peaks = peaks_by_device(work, devices)
    return None if peaks is None else sum(peaks)


def peaks_by_device(work: Callable[[], None], devices: Sequence[torch.device]) -> list[int] | None:
    """The same for each of several GPUs, or for one device of any kind."""
    gc.collect()  # what only a cycle still holds could go while `work` runs and hide as much of what it takes
    if devices[0].type == "cuda":
        for device in devices:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        idle = [torch.cuda.memory_allocated(device) for device in devices]
        work()
        for device in devices:
            torch.cuda.synchronize(device)
        return [torch.cuda.max_memory_allocated(device) - held for device, held in zip(devices, idle, strict=True)]
    try:
        Path("/proc/self/clear_refs").write_text(RESET_PEAK, encoding="ascii")
    except OSError:
        return None
    idle = resident_bytes()
    work()
    peak = peak_resident_bytes()
    return None if idle is None or peak is None else [max(peak - idle, 0)]


def _bytes(metric: str, value: float, on: str, note: str = "") -> Measurement:
    return Measurement(metric, value, "bytes", on, "lower", note=note)


def _bits(metric: str, value: float, on: str) -> Measurement:
    return Measurement(metric, value, "bits", on, "lower")
