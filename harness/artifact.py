"""A compressed model on disk and back.

A folder in the layout that transformers and vLLM read: `model.safetensors` (never pickle), `config.json`, the
tokenizer's files; plus `harness.json`, which says how to rebuild the layers that are not plain linears. Where every
compressed layer can be said in compressed-tensors' format, `config.json` says it, and those programs load the folder
with their own kernels.

What is measured is always such a folder, loaded again: nothing that a method keeps only in memory counts.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import struct
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import RunError
from harness.records import write_json_atomically
from harness.wheels import file_sha256

if TYPE_CHECKING:
    import torch
    from torch import nn

    from harness.engines.transformers import Mode
    from harness.method import LanguageModel

DESCRIPTION = "harness.json"
MAXIMUM_SHARD_BYTES = 5 * 2**30
TRUSTED_PREFIX = "methods."  # the only code that a description may name


def save(lm: LanguageModel, folder: Path) -> dict[str, Any]:
    """Write the model to `folder` so that it appears there whole or not at all; return its description.

    Uncompressed parameters are stored in `lm.storage_dtype`, a 16-bit type: a dense model counts 16 bits a weight.
    Raises RunError when the disk is full.
    """
    from huggingface_hub import save_torch_state_dict
    from safetensors import SafetensorError

    from methods.blocks import block_linears

    partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")  # another sweep may be writing the same model
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        replaced = _outermost({name: module for name, module in lm.module.named_modules() if hasattr(module, "spec")})
        state = state_to_store(lm, replaced)
        needed = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        _require_space(partial, needed)
        save_torch_state_dict(state, str(partial), max_shard_size=MAXIMUM_SHARD_BYTES, safe_serialization=True)
        write_json_atomically(_config(lm, replaced), partial / "config.json")
        if getattr(lm.module, "generation_config", None) is not None:
            lm.module.generation_config.save_pretrained(partial)
        lm.tokenizer.save_pretrained(partial)
        linears = block_linears(lm.module)
        description = {
            "storage_dtype": str(lm.storage_dtype).removeprefix("torch."),
            "linears": {name: [linear.out_features, linear.in_features] for name, linear in linears.items()},
            "modules": {name: {"_target_": _path_of(module), **module.spec()} for name, module in replaced.items()},
            "parameters": _dense_parameter_count(lm.module, replaced),
            "engine": lm.engine.settings(),
        }
        write_json_atomically(description, partial / DESCRIPTION)
        for file in partial.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        _put(partial, folder)
    except (OSError, SafetensorError) as error:  # its own type also for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"could not write the compressed model to {folder}: {reason}; free space there, or put "
            "results elsewhere with paths.results=DIR"
        ) from error
    return description


def _put(partial: Path, folder: Path) -> None:
    """Move a whole artifact to its place; one that another process has put there meanwhile, and may read, stays."""
    if (folder / DESCRIPTION).exists() and sha256(folder) == sha256(partial):
        shutil.rmtree(partial)
        return
    shutil.rmtree(folder, ignore_errors=True)
    try:
        os.replace(partial, folder)
    except OSError:
        if not (folder / DESCRIPTION).exists():  # nobody was faster: the error is real
            raise
        shutil.rmtree(partial)


def load(folder: Path, device: str | Sequence[str], dtype: torch.dtype, mode: Mode = "decoding") -> LanguageModel:
    """The model in `folder`, uncompressed parameters in `dtype`, on `device`, in evaluation mode.

    device: one, or several that hold some blocks each (harness.engines.placement); mode: what they need room for.
    Raises RunError when a file is missing, torn or does not fit its description; before weights are read where several
    devices cannot hold or run this model.
    """
    import torch
    from accelerate import init_empty_weights
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    import methods.pruning.uneven  # noqa: F401 registers models of uneven layers with the Auto classes
    from harness.engines import placement
    from harness.engines.transformers import TransformersEngine
    from harness.method import LanguageModel

    description = read_description(folder)
    devices = [device] if isinstance(device, str) else list(device)
    if len(devices) > 1:
        placement.check_engine(description.get("engine", {}))
    config = AutoConfig.from_pretrained(folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # for other programs; our layers come from the description
    with init_empty_weights(include_buffers=False):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for name, spec in description["modules"].items():
            parent, _, attribute = name.rpartition(".")
            setattr(module.get_submodule(parent), attribute, _rebuild(name, spec))
    places = {"": devices[0]}
    if len(devices) > 1:
        places = placement.device_map(module, devices, placement.free_bytes(devices), mode, dtype)
    stored = set(description["modules"])
    state: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            read = load_file(file)
        except (SafetensorError, OSError) as error:
            raise RunError(
                f"{file} is not a readable safetensors file ({error}); delete {folder} and run again"
            ) from error
        for name, tensor in read.items():
            cast = dtype if tensor.is_floating_point() and not inside(name, stored) else tensor.dtype
            state[name] = tensor.to(dtype=cast).to(placement.home_of(name, places))
    _, unexpected = module.load_state_dict(state, strict=False, assign=True)
    for child in module.modules():
        if hasattr(child, "tie_weights"):  # the model, and another that lies inside it
            child.tie_weights()
    unset = [name for name, tensor in module.state_dict().items() if tensor.is_meta]
    if unset or unexpected:
        raise RunError(
            f"{folder} does not hold this model: missing {unset[:3] or 'nothing'}, not expected "
            f"{unexpected[:3] or 'nothing'}; delete it and run again"
        )
    module.requires_grad_(False).eval()
    placement.dispatch(module, places)
    return LanguageModel(
        module=module,
        tokenizer=AutoTokenizer.from_pretrained(folder),
        engine=TransformersEngine(module, **_rebuilt("engine", description.get("engine", {}))),
        storage_dtype=getattr(torch, description["storage_dtype"]),
    )


def read_description(folder: Path) -> dict[str, Any]:
    """`harness.json` of an artifact. Raises RunError when the folder is not one."""
    try:
        return json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{folder} is not a saved model of this harness: {error}") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of an artifact, in order."""
    return sorted(folder.glob("*.safetensors"))


def stored_bytes(folder: Path) -> int:
    """Bytes of the weight files on disk."""
    return sum(file.stat().st_size for file in weight_files(folder))


def tensor_bytes(folder: Path) -> dict[str, int]:
    """Bytes of each stored tensor, read from the headers alone. Raises RunError for a header that cannot be true."""
    sizes: dict[str, int] = {}
    for file in weight_files(folder):
        try:
            with file.open("rb") as handle:
                (length,) = struct.unpack("<Q", handle.read(8))
                if length > file.stat().st_size:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(handle.read(length))
            for name, entry in header.items():
                if name != "__metadata__":
                    begin, end = entry["data_offsets"]
                    sizes[name] = end - begin
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
            raise RunError(f"{file} is not a readable safetensors file ({error})") from error
    return sizes


def sha256(folder: Path, hashes: dict[str, str] | None = None) -> str:
    """One hash over the weight files and the description: what was measured.

    hashes: of the files, where they are known (`file_hashes`).
    """
    hashes = file_hashes(folder, [*weight_files(folder), folder / DESCRIPTION]) if hashes is None else hashes
    digest = hashlib.sha256()
    for file in [*weight_files(folder), folder / DESCRIPTION]:
        digest.update(file.name.encode())
        digest.update(bytes.fromhex(hashes[file.name]))
    return digest.hexdigest()


def file_hashes(folder: Path, files: Sequence[Path] | None = None) -> dict[str, str]:
    """SHA-256 of the files of an artifact by name: of all, configuration and tokenizer too, where none are given."""
    files = [file for file in folder.rglob("*") if file.is_file()] if files is None else files
    files = sorted(files)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run: 13 GB of three files take as long as one
        hashes = pool.map(file_sha256, files)
        return {str(file.relative_to(folder)): hashed for file, hashed in zip(files, hashes, strict=True)}


def changed_file(folder: Path, hashes: dict[str, str]) -> str:
    """The first file that is not as it was when `hashes` were taken, or is gone; empty when all are."""
    for name, known in hashes.items():
        try:
            if file_sha256(folder / name) != known:
                return name
        except OSError:
            return name
    return ""


def state_to_store(lm: LanguageModel, replaced: dict[str, nn.Module]) -> dict[str, torch.Tensor]:
    """Tensors to write: compressed layers as they are, everything else in the storage type, tied tensors once."""
    tied = {
        f"{name}.{key}".lstrip(".")
        for name, child in lm.module.named_modules()
        for key in getattr(child, "all_tied_weights_keys", None) or {}
    }
    state = {}
    for name, tensor in lm.module.state_dict().items():
        if name in tied:
            continue
        if tensor.is_floating_point() and not inside(name, replaced):
            tensor = tensor.to(lm.storage_dtype)
        state[name] = tensor.detach().to("cpu").contiguous()
    return state


def _config(lm: LanguageModel, replaced: dict[str, nn.Module]) -> dict[str, Any]:
    config = json.loads(lm.module.config.to_json_string(use_diff=False))
    config.pop("quantization_config", None)
    config["architectures"] = [type(lm.module).__name__]
    config["dtype"] = str(lm.storage_dtype).removeprefix("torch.")
    schemes = {name: module.compressed_tensors_scheme() for name, module in replaced.items()}
    if schemes and all(schemes.values()):
        config["quantization_config"] = _compressed_tensors(lm.module, schemes)
    return config


def _compressed_tensors(module: nn.Module, schemes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The `quantization_config` of compressed-tensors: one group per distinct scheme."""
    from torch import nn

    groups: dict[str, list[str]] = {}
    for name, scheme in schemes.items():
        groups.setdefault(json.dumps(scheme, sort_keys=True), []).append(name)
    formats = {scheme["format"] for scheme in schemes.values()}
    dense = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "ignore": dense,
        "config_groups": {
            f"group_{index}": {"targets": ["Linear"] if len(groups) == 1 else names, **json.loads(scheme)}
            for index, (scheme, names) in enumerate(groups.items())
        },
    }


def _outermost(modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Without those inside another: a layer around a layer describes both."""
    return {name: module for name, module in modules.items() if not inside(name, modules)}


def inside(name: str, owners: Collection[str]) -> bool:
    """Whether a parameter or module lies inside one of the modules `owners` (and is not itself one)."""
    while "." in name:
        name = name.rpartition(".")[0]
        if name in owners:
            return True
    return False


def _dense_parameter_count(module: nn.Module, replaced: dict[str, nn.Module]) -> int:
    """Parameters of the model as if nothing were packed; tied ones once."""
    plain = sum(
        parameter.numel()
        for name, parameter in module.named_parameters()  # yields tied parameters once
        if not inside(name, replaced)
    )
    packed = 0
    for child in replaced.values():
        bias = getattr(child, "bias", None)
        packed += child.weight_count + (bias.numel() if bias is not None else 0)
    return plain + packed


def _path_of(module: nn.Module) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _rebuild(name: str, spec: dict[str, Any]) -> Any:
    """The layer (or other object) that a description names, those inside it first."""
    arguments = _rebuilt(name, spec)
    path, _, class_name = arguments.pop("_target_").rpartition(".")
    if not path.startswith(TRUSTED_PREFIX):
        raise RunError(f"{name}: the saved model names {path}.{class_name}, which is not part of this project")
    return getattr(importlib.import_module(path), class_name)(**arguments)


def _rebuilt(name: str, values: dict[str, Any]) -> dict[str, Any]:
    """The values, those that describe an object made into it."""
    return {
        key: _rebuild(f"{name}.{key}", value) if isinstance(value, dict) and "_target_" in value else value
        for key, value in values.items()
    }


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"the compressed model needs {needed / 2**20:.0f} MiB and {folder} has {free / 2**20:.0f} MiB free; free "
            "space there, or put results elsewhere with paths.results=DIR"
        )
