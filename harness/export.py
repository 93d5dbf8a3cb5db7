"""A compressed model as another program's checkpoint, where its format can say the same.

Models whose layers compressed-tensors can describe need no export: vLLM and transformers load the saved folder as it
is. bitsandbytes packs code books and vector-wise 8-bit weights in its own way; `python -m harness.export` writes a
folder that transformers (with bitsandbytes installed) and vLLM load.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError, RunError

if TYPE_CHECKING:
    from torch import nn

USAGE = """\
Write a compressed model in the layout of bitsandbytes, for transformers and vLLM.

usage: python -m harness.export FOLDER TARGET

FOLDER is a compressed model (below results/scratch/artifacts, or wherever you copied it) of method=nf4, fp4 or
llm_int8; TARGET is a new folder. Nothing is rounded again: codes and scales are the same numbers in another order.
"""


def export(folder: Path, target: Path) -> dict[str, Any]:
    """Write the model in `folder` to `target` for bitsandbytes; return the `quantization_config` written.

    Raises ConfigError when the target is there already or a layer has no form in bitsandbytes.
    """
    import torch
    from huggingface_hub import save_torch_state_dict

    from harness import artifact

    if target.exists():
        raise ConfigError(f"{target} is there already; name a new folder")
    lm = artifact.load(folder, "cpu", torch.float16)
    replaced = {name: module for name, module in lm.module.named_modules() if hasattr(module, "spec")}
    if not replaced:
        raise ConfigError(f"{folder} holds no compressed layer: transformers loads it as it is")
    config = _common_config(replaced, folder)
    plain = [name for name, child in lm.module.named_modules() if isinstance(child, torch.nn.Linear)]
    config = {"quant_method": "bitsandbytes", "llm_int8_skip_modules": plain or ["lm_head"], **config}
    state = artifact.state_to_store(lm, replaced)
    state = {name: tensor for name, tensor in state.items() if not artifact.inside(name, replaced)}
    for name, layer in replaced.items():
        state |= {f"{name}.{part}": tensor.contiguous() for part, tensor in layer.bitsandbytes()[1].items()}
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    save_torch_state_dict(state, str(partial), max_shard_size=artifact.MAXIMUM_SHARD_BYTES, safe_serialization=True)
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    described["quantization_config"] = config
    (partial / "config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    if (folder / "generation_config.json").exists():
        shutil.copy(folder / "generation_config.json", partial)
    lm.tokenizer.save_pretrained(partial)
    partial.rename(target)
    return config


def _common_config(replaced: dict[str, nn.Module], folder: Path) -> dict[str, Any]:
    """What every layer says about the format; bitsandbytes has one configuration for a model."""
    configs = []
    for name, layer in replaced.items():
        said = layer.bitsandbytes() if hasattr(layer, "bitsandbytes") else None
        if said is None:
            raise ConfigError(
                f"{folder}: {name} is a {type(layer).__name__} of a kind that bitsandbytes cannot hold; NF4 and FP4 in "
                "blocks of a power of two from 32, and LLM.int8() with its own outlier weights, can be exported"
            )
        configs.append(said[0])
    if any(config != configs[0] for config in configs):
        raise ConfigError(f"{folder}: its layers differ in kind, and bitsandbytes has one configuration for a model")
    return configs[0]


def main() -> None:
    """Entry of `python -m harness.export`."""
    arguments = sys.argv[1:]
    if any(argument in ("-h", "--help") for argument in arguments):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        print(USAGE)
        return
    if len(arguments) != 2:
        print(USAGE, file=sys.stderr)
        sys.exit(2)
    try:
        config = export(Path(arguments[0]), Path(arguments[1]))
    except (ConfigError, RunError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    print(f"written: {arguments[1]} ({json.dumps(config)})")


if __name__ == "__main__":
    main()
