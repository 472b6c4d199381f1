"""Names of compressed variants: ``model@w4``. No torch, because HELM's plugin reads them.

Grammar of what follows the last ``@``, any part that is not empty, in this order::

    [wN] [kvN | kN | vN | kNvN] [sP] [-minmax | -self | -entropy | -flexgen]

``wN`` are weights of N = 2, 3, 4 or 8 bits, N + 0.5 in all; with ``-entropy`` a decimal is the number in all. ``kN`` and
``vN`` are K and V of 2, 4, 8 or 16 bits (16: not compressed). A query reads P per cent of V, 1 to 99.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from flexgen_helm.errors import CompressionError

logger = logging.getLogger(__name__)

Scheme = Literal["fixed", "minmax", "self", "entropy"]
"""How weights are compressed; "fixed", the default, has no suffix."""
WEIGHT_BITS = (2, 3, 4, 8)
"""Bits of a weight that a name may give as an integer."""
WITH_SCALES = 0.5
"""Bits per weight in addition to those of the name, for scales and the like, with every scheme."""
LEAST_BITS, MOST_BITS = 2.0, 8.5
"""Bits per weight in all that a decimal may name."""
CACHE_BITS = (2, 4, 8, 16)
"""Bits of an element of K or V; 16: not compressed."""
NOT_COMPRESSED = 16
_FORM = re.compile(
    r"(?:w(?P<w>[2348]|[2-8]\.\d{1,2}))?"
    r"(?:kv(?P<kv>2|4|8|16)|(?:k(?P<k>2|4|8|16))?(?:v(?P<v>2|4|8|16))?)"
    r"(?:s(?P<s>[1-9]\d?))?"
    r"(?:-(?P<suffix>minmax|self|entropy|flexgen))?",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class CompressionConfig:
    """What of a model is compressed, and how.

    Raises:
        CompressionError: If a field is out of its range, or fields do not go together.
    """

    bits: float | None = None
    """Bits per weight in all, such as 4.5; None: weights are not compressed."""
    scheme: Scheme = "fixed"
    """How weights are compressed."""
    k_bits: int = NOT_COMPRESSED
    """Bits of an element of K; 16: not compressed."""
    v_bits: int = NOT_COMPRESSED
    """Bits of an element of V; 16: not compressed."""
    sparsity: int | None = None
    """Per cent of V that a query reads, 1 to 99; None: all."""
    flexgen: bool = False
    """Whether everything is compressed as FlexGen does it, for comparison; weights by "minmax"."""

    def __post_init__(self) -> None:
        self._check_weights()
        for name in ("k_bits", "v_bits"):
            bits = getattr(self, name)
            if not _is_int(bits) or bits not in CACHE_BITS:
                raise CompressionError(f"{name} is {bits!r}. Give one of {', '.join(map(str, CACHE_BITS))}.")
        if self.sparsity is not None and not (_is_int(self.sparsity) and 1 <= self.sparsity <= 99):
            raise CompressionError(f"sparsity is {self.sparsity!r}. Give a per cent of V from 1 to 99, or None for all of it.")
        if self.flexgen and not (self.compresses_cache or self.sparsity is not None):
            raise CompressionError(
                "`-flexgen` needs K or V of less than 16 bits, or `s`. For FlexGen's weights alone write `-minmax`."
            )

    def _check_weights(self) -> None:
        if self.scheme not in get_args(Scheme):
            raise CompressionError(f"scheme is {self.scheme!r}. Give one of {', '.join(map(repr, get_args(Scheme)))}.")
        if self.bits is None:
            if self.scheme != "fixed":
                raise CompressionError(f"`-{self.scheme}` is a way to compress weights. Give their bits, such as `w4`.")
            return
        if not isinstance(self.bits, float):
            raise CompressionError(f"bits is {self.bits!r}. Give the bits per weight in all, such as 4.5.")
        if self.flexgen and self.scheme != "minmax":
            raise CompressionError('FlexGen\'s weights are compressed by "minmax". Give no other scheme with `-flexgen`.')
        in_all = [bits + WITH_SCALES for bits in WEIGHT_BITS]
        if self.scheme != "entropy" and self.bits not in in_all:
            raise CompressionError(
                f"bits is {self.bits}, which the scheme {self.scheme!r} does not have: the number in all is one of "
                f'{", ".join(map(str, in_all))}. Give one of them, or the scheme "entropy".'
            )
        if not LEAST_BITS <= self.bits <= MOST_BITS or round(self.bits, 2) != self.bits:
            raise CompressionError(
                f"There are no weights of {self.bits} bits in all. Give {LEAST_BITS} to {MOST_BITS}, in steps of 0.01."
            )

    @property
    def compresses_cache(self) -> bool:
        """Whether K or V are compressed."""
        return min(self.k_bits, self.v_bits) < NOT_COMPRESSED

    @property
    def canonical(self) -> str:
        """Name of the variant, one for each; empty where nothing is compressed."""
        suffix = "flexgen" if self.flexgen else self.scheme
        return f"{self._weights}{self._cache}{self._sparsity}{'' if suffix == 'fixed' else f'-{suffix}'}"

    @property
    def weight_scheme(self) -> str:
        """Name of everything that decides the compressed weights; "plain" where they are not compressed."""
        if self.bits is None:
            return "plain"
        return self._weights if self.scheme == "fixed" else f"{self._weights}-{self.scheme}"

    @property
    def cache_scheme(self) -> str:
        """Name of everything that decides the stored K and V; "plain" where they are not compressed."""
        if self.flexgen:
            return f"{self._cache or 'plain'}-flexgen"
        # Ranges of 2 bits are cut since some version; before, they were whole.
        return f"{self._cache or 'plain'}{'-cut' if 2 in (self.k_bits, self.v_bits) else ''}"

    @property
    def description(self) -> str:
        """The variant in words, such as "4-bit weights, 8-bit K/V"; empty where nothing is compressed."""
        parts = [part for part in (self._describe_weights(), *self._describe_cache()) if part]
        return f"{'FlexGen: ' if self.flexgen else ''}{', '.join(parts)}"

    @property
    def _number(self) -> str:
        """The number behind ``w``: an integer where there is one."""
        assert self.bits is not None
        if self.bits - WITH_SCALES in WEIGHT_BITS:
            return f"{self.bits - WITH_SCALES:.0f}"
        return f"{self.bits:.2f}".removesuffix("0")

    @property
    def _weights(self) -> str:
        return "" if self.bits is None else f"w{self._number}"

    @property
    def _cache(self) -> str:
        if self.k_bits == self.v_bits:
            return f"kv{self.k_bits}" if self.compresses_cache else ""
        return "".join(f"{name}{bits}" for name, bits in (("k", self.k_bits), ("v", self.v_bits)) if bits < NOT_COMPRESSED)

    @property
    def _sparsity(self) -> str:
        return "" if self.sparsity is None else f"s{self.sparsity}"

    def _describe_weights(self) -> str:
        if self.bits is None:
            return ""
        # A decimal says by itself that weights are entropy-coded, and FlexGen's are minmax.
        plain = self.scheme == "fixed" or self.flexgen or "." in self._number
        word = {"minmax": "minmax ", "self": "self-fitted ", "entropy": "entropy-coded "}.get("" if plain else self.scheme, "")
        return f"{self._number}-bit {word}weights"

    def _describe_cache(self) -> list[str]:
        if self.k_bits == self.v_bits:
            parts = [f"{self.k_bits}-bit K/V"] if self.compresses_cache else []
        else:
            parts = [f"{bits}-bit {name}" for name, bits in (("K", self.k_bits), ("V", self.v_bits)) if bits < NOT_COMPRESSED]
        return parts + ([] if self.sparsity is None else [f"{self.sparsity} % of V"])


PARTS: Mapping[str, str] = {
    "w": "`w2`, `w3`, `w4`, `w8` (bits of a weight)",
    "kv": "`kv2`, `kv4`, `kv8`, or `k` and `v` apart (bits of K and V)",
    "s": "`s1` to `s99` (per cent of V that a query reads)",
    "-minmax": "`-minmax` behind `w` (FlexGen's scheme)",
    "-self": "`-self` behind `w` (fitted to text that the model wrote)",
    "-entropy": "`-entropy` behind `w` or a decimal, such as `w3.25-entropy`",
    "-flexgen": "`-flexgen` behind `kv`, `k`, `v` or `s` (all of it FlexGen's)",
}
"""Parts of a name, for messages."""


def parse(text: str) -> CompressionConfig:
    """Return the configuration that a name gives.

    Args:
        text: What follows the ``@``, such as ``w4`` or ``w3.25kv8-entropy``.

    Raises:
        CompressionError: If there is no such variant; the message lists what there is.
    """
    found = _FORM.fullmatch(text)
    if found is None or not text:
        raise CompressionError(f"There is no variant `@{text}` of a model. {_there_is()}")
    part = found.groupdict()
    flexgen, scheme = part["suffix"] == "flexgen", part["suffix"] or "fixed"
    if "." in (part["w"] or "") and scheme != "entropy":
        raise CompressionError(
            f"There is no variant `@{text}` of a model. A decimal number of bits needs `-entropy`, as in "
            f"`w{part['w']}-entropy`. Otherwise give one of {', '.join(f'`w{bits}`' for bits in WEIGHT_BITS)}."
        )
    if flexgen:
        scheme = "fixed" if part["w"] is None else "minmax"
    both = part["kv"] or NOT_COMPRESSED
    try:
        return CompressionConfig(
            bits=None if part["w"] is None else float(part["w"]) + WITH_SCALES * ("." not in part["w"]),
            scheme=scheme,  # type: ignore[arg-type]  # the form has no others
            k_bits=int(part["k"] or both),
            v_bits=int(part["v"] or both),
            sparsity=None if part["s"] is None else int(part["s"]),
            flexgen=flexgen,
        )
    except CompressionError as error:
        raise CompressionError(f"There is no variant `@{text}` of a model. {error}") from None


def split_variant(name: str) -> tuple[str, CompressionConfig | None]:
    """Split the name or folder of a model at its last ``@``.

    Args:
        name: Such as ``org/model@w4`` or ``/path/to/model@w4``. An existing folder of the full name is that folder.

    Returns:
        The name without the variant; and the variant, None where the name has none.

    Raises:
        CompressionError: If there is no such variant.
    """
    model, at, text = name.rpartition("@")
    if not at or "/" in text or not model.rpartition("/")[2]:
        return name, None
    if Path(name).expanduser().is_dir():
        logger.info("%s is a folder, so `@%s` names no compressed variant", name, text)
        return name, None
    return model, parse(text)


def with_variant(name: str, config: CompressionConfig | None) -> str:
    """Return the name of a model with its variant, in canonical form."""
    return f"{name}@{config.canonical}" if config is not None and config.canonical else name


def resolve(name: str, compression: str | CompressionConfig | None = None) -> tuple[str, CompressionConfig | None]:
    """Return the name without its variant, and what is to be compressed; None: nothing.

    Args:
        name: Name or folder of a model, with or without ``@``.
        compression: The same as what may follow the ``@``, or its configuration.

    Raises:
        CompressionError: If there is no such variant, or the two arguments differ.
    """
    model, named = split_variant(name)
    given = parse(compression) if isinstance(compression, str) else compression
    if not (given is None or isinstance(given, CompressionConfig)):
        raise CompressionError(f"compression is {given!r}. Give a text such as 'w4', or a CompressionConfig.")
    if named is not None and given is not None and named != given:
        raise CompressionError(
            f"`{name}` names the variant `{named.canonical}`, but compression is `{given.canonical}`. Give one of them."
        )
    config = named or given
    if config is None or not config.canonical:
        return model, None
    return model, config


def _there_is() -> str:
    return f"There are {'; '.join(PARTS.values())}."


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
