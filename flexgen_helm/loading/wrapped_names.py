"""Names of tensors that a wrapper of a training program made longer: who wrote them, and how they become short again."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

WRAPPERS = {
    "module.": "torch's DataParallel or DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "base_model.model.": "PEFT",
    "base_layer.": "PEFT",
    "_fsdp_wrapped_module.": "torch's FullyShardedDataParallel",
    "_checkpoint_wrapped_module.": "torch's activation checkpointing",
}
"""What a wrapper puts into the names of the tensors in it, at their beginning or behind a dot."""
KNOWN = re.compile(f"({'|'.join(map(re.escape, WRAPPERS))})+")


@dataclass(frozen=True)
class Shortened:
    """A tensor's name without what may be too much in it."""

    short: str
    extra: tuple[str, ...]
    """What was left out."""
    mapping: dict[str, str]
    """Regular expressions and what they become, as `from_pretrained` takes them."""


def shorter_names(name: str) -> Iterator[Shortened]:
    """Yield a name without its beginning, for every beginning that ends with a dot, those of known wrappers first.

    Then the same without the wrappers inside it.
    """
    inner = tuple(wrapper for wrapper in WRAPPERS if f".{wrapper}" in name)
    for wrappers in [(), inner] if inner else [()]:
        left, mapping = name, {}
        for wrapper in wrappers:
            left = left.replace(f".{wrapper}", ".")
            mapping[rf"\.{re.escape(wrapper)}"] = "."
        dots = [0, *(place.end() for place in re.finditer(r"\.", left))]
        for end in sorted(dots, key=lambda end: not KNOWN.fullmatch(left[:end])):
            beginning = left[:end]
            whole = {rf"^{re.escape(beginning)}": ""} | mapping if beginning else mapping
            yield Shortened(left[end:], (beginning, *wrappers) if beginning else wrappers, whole)


def renaming_advice(folder: Path, names: Iterable[str], name: str, found: Shortened) -> str:
    """Return what wrote the names of a checkpoint, and the line of Python that saves it with those of its model.

    Args:
        folder: Of the model.
        names: Of all tensors in its files.
        name: One of them.
        found: What has a place in the model, of what `shorter_names` gave for it.
    """
    writers = sorted({WRAPPERS[wrapper] for wrapper in WRAPPERS for extra in found.extra if f".{wrapper}" in f".{extra}"})
    said = f"Names in its files hold {' and '.join(map(repr, found.extra))} beside the model's names, as in {name}"
    said += f". They come from {' and '.join(writers)}. " if writers else ". "
    if any("lora_" in each for each in names):
        return said + "The files hold an adapter too: call merge_and_unload() on the PEFT model, and save what it returns."
    read = f"from_pretrained({str(folder)!r}, dtype='auto', key_mapping={found.mapping!r})"
    return said + (
        "Save the model without its wrapper, or rename the tensors once: "
        f"AutoModelForCausalLM.{read}.save_pretrained(new_folder, save_original_format=False)."
    )
