"""Explain tensor names that a wrapper, such as torch.compile, made longer: which wrapper, and how to shorten them again."""

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
"""Strings that wrappers insert into the names of tensors, at the beginning or after a dot, with the wrapper's name."""
KNOWN = re.compile(f"({'|'.join(map(re.escape, WRAPPERS))})+")
"""Matches a sequence of such strings."""


@dataclass(frozen=True)
class Shortened:
    """A tensor's name without the parts that a wrapper may have inserted."""

    short: str
    """The shorter name."""
    extra: tuple[str, ...]
    """The parts that were removed."""
    mapping: dict[str, str]
    """Regular expressions with their replacements, as ``key_mapping`` of `from_pretrained` takes them."""


def shorter_names(name: str) -> Iterator[Shortened]:
    """Yield shorter forms of a name.

    Each form lacks a beginning that ends with a dot. Beginnings of known wrappers come first, and the empty one is included. If
    known wrappers occur inside of the name, the forms without these follow.

    Args:
        name: Name of a tensor in a file.
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
    """Return advice for a user: which wrapper wrote the names of a checkpoint, and a line of Python that saves it without them.

    Args:
        folder: The folder of the checkpoint.
        names: Names of all tensors in its files.
        name: One of these names, as an example.
        found: The form of ``name``, from `shorter_names`, that is a tensor of the model.
    """
    writers = sorted({WRAPPERS[wrapper] for wrapper in WRAPPERS for extra in found.extra if f".{wrapper}" in f".{extra}"})
    said = f"Names in its files hold {' and '.join(map(repr, found.extra))} in addition to the model's names, as in {name}"
    said += f". They come from {' and '.join(writers)}. " if writers else ". "
    if any("lora_" in each for each in names):
        return said + "The files hold an adapter too: call merge_and_unload() on the PEFT model, and save what it returns."
    read = f"from_pretrained({str(folder)!r}, dtype='auto', key_mapping={found.mapping!r})"
    return said + (
        "Save the model without its wrapper, or rename the tensors once: "
        f"AutoModelForCausalLM.{read}.save_pretrained(new_folder, save_original_format=False)."
    )
