"""Plain dataclasses that the folders of the package exchange. No torch, no HELM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast, get_args

from flexgen_helm.errors import FlexGenError, PolicyError

FinishReason = Literal["length", "stop", "endoftext"]
Tier = Literal["device", "host", "disk"]
TIERS: tuple[Tier, ...] = ("device", "host", "disk")
"""Tiers from fast to slow: device (a GPU, or the CPU if there is none), host (RAM) and disk (files)."""
Shares = tuple[float, float, float]
"""Shares on device, host and disk, in the order of TIERS; they add up to 1."""
ON_DEVICE: Shares = (1.0, 0.0, 0.0)
ON_HOST: Shares = (0.0, 1.0, 0.0)
ROUNDING = 1e-6
"""Largest difference between the sum of shares and 1."""
Resource = Literal[
    "device", "cpu_attention", "unpack", "host_to_device", "device_to_host", "disk_read", "disk_write", "scheduler"
]
RESOURCES: tuple[Resource, ...] = get_args(Resource)
"""Resources that can be busy during a sweep, in parallel with each other."""
LINKS: tuple[Resource, ...] = ("host_to_device", "device_to_host", "disk_read", "disk_write")
"""Resources that move bytes between tiers."""
DEFAULT_NEW_TOKENS = 16
Kernel = Literal["torch", "triton"]
SlabCoding = Literal["plain", "lossless"]
SLAB_CODINGS = ("auto", *get_args(SlabCoding))


class TokenLogprob(NamedTuple):
    """One candidate token and its log-probability.

    Attributes:
        token_id: Number of the token in the vocabulary.
        logprob: Natural logarithm of its probability under the model, before ``temperature`` and ``top_p``.
    """

    token_id: int
    logprob: float


@dataclass(frozen=True)
class Job:
    """One request to the model: a prompt, limits, and which log-probabilities it needs.

    Give one of ``prompt``, ``token_ids`` and ``messages``.

    Attributes:
        prompt: Text of the prompt. It is tokenised without special tokens. If the tokenizer itself would add a BOS token, the
            model's input gets one and the result does not show it.
        token_ids: Token ids of the prompt, used unchanged.
        messages: A conversation: ``role`` (system, user or assistant) and ``content`` of each turn. The model's own chat
            template formats it and adds its special tokens. No chat template is applied to ``prompt`` and ``token_ids``.
        max_new_tokens: Most generated tokens of each completion. None: 0 with ``score_prompt``, else 16.
        temperature: 0 to 0.001: the most likely token. Above: samples of the model's distribution at this temperature.
        top_p: Nucleus sampling: the smallest set of tokens whose probability reaches this value, above 0 and at most 1.
        num_completions: Completions of the prompt. Greedy ones are equal.
        seed: Seed of the samples. None is 0. Equal jobs with equal seeds give equal answers.
        stop: Strings of any length. The text ends before the first one that appears.
        score_prompt: Whether to return the log-probability of each prompt token.
        top_logprobs: Number of most likely candidates to return for each generated token. Prompt tokens have none.
        ignore_eos: Whether to continue after an end token. Benchmarks do, because they need answers of a known length.
    """

    prompt: str | None = None
    token_ids: Sequence[int] | None = None
    messages: Sequence[Mapping[str, str]] | None = None
    max_new_tokens: int = None  # type: ignore[assignment]  # a number once the job is made
    temperature: float = 0.0
    top_p: float = 1.0
    num_completions: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    score_prompt: bool = False
    top_logprobs: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if cast("int | None", self.max_new_tokens) is None:
            object.__setattr__(self, "max_new_tokens", 0 if self.score_prompt else DEFAULT_NEW_TOKENS)


@dataclass(frozen=True)
class Completion:
    r"""One generated continuation. All lists are as long as ``token_ids``.

    Attributes:
        text: Decoded text, cut before the stop string and without the end token.
        token_ids: Every token up to the one in which the stop string begins, the end token included.
        token_texts: Text of each token: part of a character as ``bytes:\xe2\x80``, a special token as its literal text.
        logprobs: Natural logarithm of each token's probability under the model, before ``temperature`` and ``top_p``.
        top_logprobs: The ``Job.top_logprobs`` most likely candidates at each step, best first.
        finish_reason: "length" (``max_new_tokens`` reached), "stop" (a stop string) or "endoftext" (an end token).
        num_text_tokens: Tokens that contribute to ``text``: not the end token, and none at whose start a stop string begins.
    """

    text: str
    token_ids: list[int]
    token_texts: list[str]
    logprobs: list[float]
    top_logprobs: list[list[TokenLogprob]]
    finish_reason: FinishReason
    num_text_tokens: int


@dataclass(frozen=True)
class Result:
    """The answer to one job.

    Attributes:
        completions: Completions, ``Job.num_completions`` of them; none with ``max_new_tokens=0``.
        prompt_token_ids: Tokens of the prompt, without a BOS token that was added to the input.
        prompt_token_texts: Text of each prompt token, as in ``Completion.token_texts``. Empty without ``Job.score_prompt``.
        prompt_logprobs: Natural logarithm of the probability of each prompt token; 0.0 for a first token without a BOS token
            before it. None without ``Job.score_prompt``.
        prompt_is_best: Whether no token was more likely than each prompt token; False for a first token without a BOS token
            before it. None without ``Job.score_prompt``.
        error: Error for which this job was not served, with ``on_error="return"``. Then all other fields are empty.
    """

    completions: list[Completion] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_token_texts: list[str] = field(default_factory=list)
    prompt_logprobs: list[float] | None = None
    prompt_is_best: list[bool] | None = None
    error: FlexGenError | None = None


@dataclass(frozen=True)
class Policy:
    """Sizes and placement of the computation (FlexGen sections 3 and 4; docs/offloading.md has a table of the defaults).

    ``gpu_batch_size`` and ``gpu_batch_tokens`` are part of the numerics, and so is ``cpu_attention`` on a GPU, because a CPU
    rounds differently. The others change no bit of an answer.

    Attributes:
        gpu_batch_size: Sequences in a decode row; a row with fewer is padded. Also the positions in a slice of the output
            head. None: chosen by device, never by other fields of the policy.
        num_gpu_batches: Decode rows in a block. A block decodes ``gpu_batch_size * num_gpu_batches`` sequences at once.
        gpu_batch_tokens: Tokens in a prefill row; a row with fewer is padded. None: chosen by device.
        block_tokens: Prompt tokens computed in one sweep. None: chosen by the free memory.
        weights: Shares of the weights on device, host and disk, in whole layers. None: everything is on the device if it
            fits; else the device is filled, then the host, and the remaining layers are on disk.
        cache: Shares of the K/V cache on device, host and disk. None: all on the host if ``cpu_attention`` is 1 beside a device
            with a memory of its own, else all on the device.
        hidden: Shares of the rows whose hidden states are stored on device, host and disk between two layers.
        cpu_attention: Share of the decode rows whose attention to the host's part of the cache is computed on the CPU; on a GPU
            0 or 1. None: chosen by model, machine and limits (`flexgen_helm.policy.attention_place`).
        prefetch: Layers that are loaded ahead. ``prefetch + 1`` layers are on the device in addition to the resident ones.
        overlap: Whether transfers and computation overlap.
        keep_packed: Whether compressed weights stay packed on the device, though the unpacked model fits there.
        slab_coding: How 16-bit weights lie on disk: "plain", "lossless" (fewer bytes, the same bits), or "auto": as is faster.
        num_lanes: Sweeps in flight where layers are divided into stages, each with a block and a part of the cache of its own.
            More of them hide the latency of a network. None: as many as stages. It cannot be set in one process.
        auto: Whether `num_gpu_batches`, `block_tokens`, `prefetch` and shares that have their defaults are chosen for the
            workload, if it is known and weights or K/V do not all fit on the device (docs/planning.md).

    Raises:
        PolicyError: If a field is out of its range.
    """

    gpu_batch_size: int | None = None
    num_gpu_batches: int = 4
    gpu_batch_tokens: int | None = None
    block_tokens: int | None = None
    weights: Shares | None = None
    cache: Shares | None = None
    hidden: Shares = ON_DEVICE
    cpu_attention: float | None = None
    prefetch: int = 1
    overlap: bool = True
    keep_packed: bool = False
    slab_coding: Literal["auto", "plain", "lossless"] = "auto"
    num_lanes: int | None = None
    auto: bool = False

    def __post_init__(self) -> None:
        for name in ("gpu_batch_size", "num_gpu_batches", "gpu_batch_tokens", "block_tokens", "prefetch", "num_lanes"):
            value = getattr(self, name)
            if not self._may_be_open(name) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise PolicyError(f"{name} must be an integer of at least 1, not {value!r}.")
        if not _is_share(self.cpu_attention) and not self._may_be_open("cpu_attention"):
            raise PolicyError(f"cpu_attention must be a number from 0 to 1, not {self.cpu_attention!r}.")
        for name in ("overlap", "keep_packed", "auto"):
            if not isinstance(getattr(self, name), bool):
                raise PolicyError(f"{name} must be true or false, not {getattr(self, name)!r}.")
        if self.slab_coding not in SLAB_CODINGS:
            raise PolicyError(f"slab_coding must be one of {', '.join(SLAB_CODINGS)}, not {self.slab_coding!r}.")
        for name in ("weights", "cache", "hidden"):
            if not self._may_be_open(name):
                shares = _shares(name, getattr(self, name))  # a list, as YAML and JSON have it, becomes a tuple
                object.__setattr__(self, name, shares)

    def _may_be_open(self, name: str) -> bool:
        """Return whether a field is None, and None is its default."""
        return getattr(self, name) is None and getattr(type(self), name) is None


@dataclass(frozen=True)
class ResolvedPolicy(Policy):
    """A policy whose row sizes (``gpu_batch_size`` and ``gpu_batch_tokens``), cache and place of attention are decided."""

    gpu_batch_size: int = field(kw_only=True)
    gpu_batch_tokens: int = field(kw_only=True)
    cache: Shares = ON_DEVICE
    cpu_attention: float = 1.0

    @property
    def block_size(self) -> int:
        """Most sequences that decode in one sweep."""
        return self.gpu_batch_size * self.num_gpu_batches


def _shares(name: str, given: object) -> Shares:
    shares = tuple(given) if isinstance(given, list | tuple) else ()
    if len(shares) != len(TIERS) or not all(map(_is_share, shares)) or abs(sum(shares) - 1) > ROUNDING:
        raise PolicyError(
            f"{name} must be three shares, for {', '.join(TIERS)}: numbers from 0 to 1 that add up to 1, such as "
            f"[0.2, 0.8, 0], not {given!r}."
        )
    return float(shares[0]), float(shares[1]), float(shares[2])


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


@dataclass(frozen=True)
class WeightNumerics:
    """Everything that decides the bits of the weights; it identifies a slab."""

    digest: str
    """Digest of the model's files."""
    dtype: str
    """Dtype of the weights when a layer computes, such as "float32"."""
    scheme: str = "plain"
    """Name of the compression; "plain": none."""
    statistics: str = ""
    """Digest of the statistics to which the compression was fitted; empty: none."""


@dataclass(frozen=True)
class CacheNumerics:
    """The form in which K and V are stored and read."""

    dtype: str
    """Dtype in which attention reads K and V, such as "float32"."""
    format: str = "plain"
    """Name of the pages' compression; "plain": none."""
    sparsity: float = 1.0
    """Share of V that a query reads; 1: all."""


@dataclass(frozen=True)
class RowNumerics:
    """Kind and sizes of the rows in which sequences are computed."""

    kind: str
    """"packed" (many sequences share a row) or "single" (one sequence in a row)."""
    gpu_batch_size: int
    """Sequences in a decode row."""
    gpu_batch_tokens: int
    """Tokens in a prefill row."""


@dataclass(frozen=True)
class MachineNumerics:
    """The kernels that compute."""

    device: str
    """"cpu" or "cuda"."""
    attention: str = "device"
    """Tier on which decode rows attend: "device", or "host" beside a GPU (`flexgen_helm.policy.attention_place`)."""
    matmul: str = "torch"
    """Library of the matrix products."""
    compiled: bool = False
    """Whether layers are compiled."""
    kernel: Kernel = "torch"
    """Library of attention on the device: "triton" for one kernel that reads pages in place, "torch" for several calls."""


@dataclass(frozen=True)
class Numerics:
    """Everything besides the job, but not placement, that decides an answer's bits: cache keys, slabs and reports go by it."""

    weights: WeightNumerics
    cache: CacheNumerics
    rows: RowNumerics
    machine: MachineNumerics
    engine: int
    """Version of the code, raised with every change that may change a bit of an answer."""

    @property
    def policy_fields(self) -> dict[str, float]:
        """Fields of a `Policy` that name what was decided here, so that another engine is made in the same way."""
        fields: dict[str, float] = {name: getattr(self.rows, name) for name in ("gpu_batch_size", "gpu_batch_tokens")}
        if self.machine.device != "cpu" and self.rows.kind == "packed":
            fields["cpu_attention"] = float(self.machine.attention == "host")
        return fields

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Numerics:
        """Return the numerics for a dictionary that `dataclasses.asdict` made.

        Raises:
            TypeError: If fields are missing or unknown, because another version of the package made the dictionary.
        """
        kinds = {"weights": WeightNumerics, "cache": CacheNumerics, "rows": RowNumerics, "machine": MachineNumerics}
        return cls(**{name: kinds[name](**value) if name in kinds else value for name, value in plain.items()})


@dataclass(frozen=True)
class StageInfo:
    """A stage of a pipeline: its layers, and its bytes on each tier."""

    name: str
    """Number, rank and host."""
    first_layer: int
    last_layer: int
    weight_bytes: dict[str, int]
    """See `EngineInfo`."""
    planned_bytes: dict[str, int]
    """See `EngineInfo`; rows on their way between stages are `travel_bytes`."""
    cache_bytes: dict[str, int]
    """See `EngineInfo`."""
    travel_bytes: int
    """Most bytes of rows on their way between this stage and others."""


@dataclass(frozen=True)
class EngineInfo:
    """Description of an engine: its policy, its numerics, and its bytes on each tier."""

    policy: ResolvedPolicy
    numerics: Numerics
    bits_per_weight: float
    """Average bits of a weight."""
    bits_per_cache_element: float
    """Bits of an element of K and V, or of other state that a model keeps in their place."""
    weight_bytes: dict[str, int]
    """Bytes of weights on each tier: device, host, disk."""
    bits_per_compressed_weight: float | None = None
    """Bits of a weight of compressed matrices, everything counted; None: there are none."""
    statistics: str = ""
    """What made the statistics of the compression; empty: nothing."""
    bits_per_k_element: float | None = None
    bits_per_v_element: float | None = None
    """Likewise of an element of K, and of one of V, whose means are counted; None: not recorded."""
    bits_per_weight_on_disk: float | None = None
    """Bits of a weight in slabs on disk, everything counted; None: there are none."""
    planned_bytes: dict[str, int] = field(default_factory=dict)
    """Bytes of weights, slots and buffers on each tier, planned before anything was allocated."""
    cache_bytes: dict[str, int] = field(default_factory=dict)
    """Most bytes of K and V on each tier."""
    bit_stable: bool | None = None
    """Whether neighbours changed no bit in the self-check at load; None: not measured on the device that computes."""
    released_dtype: str = ""
    """The dtype in which the checkpoint says that its weights are, such as "bfloat16"; empty: it does not say."""
    stages: tuple[StageInfo, ...] = ()
    """Stages of a pipeline, each with its own bytes; bytes elsewhere are the first one's. None: one process has all layers."""
