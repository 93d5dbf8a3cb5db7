"""`method=[sparsegpt,gptq]`: one method after the other, said on the command line.

Every step is the configuration file of its method, composed under `steps.NAME`; root values (bits, sparsity) reach all
of them. What the run sees is one method, `methods.stack.Stack`, with a card of its own; the order is in the record.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

JOINT = "+"  # between the names of a stack: method=sparsegpt+gptq is the same as method=[sparsegpt,gptq]


def register(arguments: Sequence[str]) -> list[str]:
    """Make the stacks that the overrides name known to Hydra; the overrides, with every stack as one name."""
    written = [_joined(argument) for argument in arguments]
    for argument in written:
        key, _, value = argument.partition("=")
        if key == "method":
            for name in value.split(","):
                if JOINT in name:
                    _store(name.strip())
    return written


def flatten(cfg: DictConfig) -> DictConfig:
    """A composed stack as a configuration with one method and one card; anything else as it is.

    References inside a step (`${method.grid.bits}`) are to its own method.
    """
    from omegaconf import OmegaConf

    if "steps" not in cfg:
        return cfg
    whole = {key: value for key, value in cfg.items_ex(resolve=False) if key != "steps"}
    cards, methods = [], []
    for step in cfg.steps.values():
        own = OmegaConf.create({**whole, "card": step.card, "method": step.method})
        cards.append(OmegaConf.to_container(own.card, resolve=True))
        methods.append(OmegaConf.to_container(own.method, resolve=True))
    names = [card["name"] for card in cards]
    stack = {"_target_": "methods.stack.Stack", "names": names, "steps": methods}
    asked = [method["decoding"] for method in methods if method.get("decoding")]
    if asked:  # a student is asked as it was taught, whatever was done to it since
        stack["decoding"] = asked[-1]
    return OmegaConf.create({**whole, "card": _card(cards), "method": stack})


def _joined(argument: str) -> str:
    key, equals, value = argument.partition("=")
    if key != "method" or "[" not in value:
        return argument
    return key + equals + re.sub(r"\[([^\[\]]*)\]", lambda found: re.sub(r"\s*,\s*", JOINT, found[1].strip()), value)


def _store(name: str) -> None:
    from hydra.core.config_store import ConfigStore

    steps = name.split(JOINT)
    if len(set(steps)) < len(steps) or "dense" in steps:
        raise ConfigError(f"method=[{','.join(steps)}]: every method stands once in a stack, and dense is none")
    defaults = [{f"/method@steps.{step}": step} for step in steps]
    node = {"defaults": defaults, "card": {}, "method": {}}
    ConfigStore.instance().store(group="method", name=name, node=node, package="_global_")


def _card(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """What a row says about a stack: the widths that its steps leave behind, and what each of them departs in."""

    def last(field: str) -> Any:
        return next((card[field] for card in reversed(cards) if card.get(field) is not None), None)

    def lines(field: str) -> list[str]:
        return [f"{card['title']}: {line}" for card in cards for line in card.get(field) or []]

    # other ways to run the same weights stand together, whatever the weights
    leading = next((card for card in cards if card["taxonomy"].startswith("architecture/")), cards[0])
    return {
        "name": JOINT.join(card["name"] for card in cards),
        "version": JOINT.join(str(card["version"]) for card in cards),
        "title": f" {JOINT} ".join(card["title"] for card in cards),
        "taxonomy": leading["taxonomy"],
        "paper": ", ".join(dict.fromkeys(card["paper"] for card in cards if card.get("paper"))),
        "bits": last("bits"),
        "activation_bits": last("activation_bits"),
        "key_value_bits": last("key_value_bits"),
        "runtime": None,
        "calibrates": _calibrates([card.get("calibrates", True) for card in cards]),
        "departures": lines("departures"),
        "notes": lines("notes"),
    }


def _calibrates(steps: list[bool | str]) -> bool | str:
    """Of a stack: what the step that depends on most depends on."""
    return True if True in steps else next((value for value in steps if value), False)
