"""The shards of a checkpoint: checked by header and size, named when they are wrong, read exactly."""

from __future__ import annotations

import json
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from flexgen_helm.errors import CorruptFile, UnsupportedModel
from flexgen_helm.loading.checkpoint import INDEX_FILE, PIECE_BYTES, group_by_layer, layer_of, read_tensors
from flexgen_helm.loading.read_model import read_model
from tests.weight_files import opened_weight_files
from tests.workbench import Workbench

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.uint8]
SHARD = "model-00002-of"
"""Begin of the name of the shard that is broken."""


@pytest.fixture
def folder(bench: Workbench, tmp_path: Path) -> Path:
    """A checkpoint of several shards, free to be broken."""
    return Path(shutil.copytree(bench.folder("mistral"), tmp_path / "model"))


def shard(folder: Path) -> Path:
    return next(folder.glob(f"{SHARD}*.safetensors"))


def load(folder: Path) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(folder)
    return read_model("org/model", folder, config, dtype=torch.float32, device=torch.device("cpu"))


def truncate(size: int) -> Callable[[Path], object]:
    return lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:size])


def header_bytes(folder: Path) -> int:
    return 8 + int.from_bytes(shard(folder).read_bytes()[:8], "little")


def drop_tensor(folder: Path) -> None:
    tensors = load_file(shard(folder))
    tensors.pop(min(tensors))
    save_file(tensors, shard(folder), metadata={"format": "pt"})


def edit_header(**entry: object) -> Callable[[Path], object]:
    """Changes fields of the first tensor in the header."""

    def change(folder: Path) -> None:
        content = shard(folder).read_bytes()
        end = header_bytes(folder)
        header = json.loads(content[8:end])
        header[min(header.keys() - {"__metadata__"})].update(entry)
        new = json.dumps(header).encode()
        shard(folder).write_bytes(struct.pack("<Q", len(new)) + new + content[end:])

    return change


def write(content: bytes) -> Callable[[Path], object]:
    return lambda folder: shard(folder).write_bytes(content)


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: shard(folder).unlink(), "is missing"),
    "empty": (truncate(0), "is torn: it has 0 bytes"),
    "torn in the length": (truncate(5), "is torn: it has 5 bytes"),
    "torn in the header": (truncate(100), r"is torn: it has 100 bytes of a header of \d+"),
    "torn in the data": (
        lambda folder: truncate(shard(folder).stat().st_size - 1)(folder),
        r"is torn: it has \d+ of \d+ bytes",
    ),
    "all data missing": (lambda folder: truncate(header_bytes(folder))(folder), r"is torn: it has \d+ of \d+ bytes"),
    "too long": (lambda folder: write(shard(folder).read_bytes() + b"x")(folder), r"is too long: it has \d+ of \d+ bytes"),
    "garbage": (write(b"garbage!" * 100), "is not a safetensors file"),
    "HTML": (write(b"<html><body>Not found</body></html>"), "is not a safetensors file"),
    "header that is no JSON": (write(struct.pack("<Q", 16) + b"{" + b"x" * 99), "is not a safetensors file.*JSON"),
    "header without offsets": (edit_header(data_offsets=None), "is not a safetensors file.*header"),
    "shape that does not fit the bytes": (edit_header(shape=[3, 5]), r"is not a safetensors file.*\[3, 5\]"),
    "pointer of Git LFS": (write(b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n"), "git lfs pull"),
    "lacks a tensor": (drop_tensor, r"lacks model\.\S+, which model\.safetensors\.index\.json says it holds"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_shard_is_named_before_any_tensor_is_read(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = BROKEN[kind]
    name = shard(folder).name
    change(folder)
    monkeypatch.setattr("flexgen_helm.loading.checkpoint.StoredTensor.to", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(CorruptFile, match=rf"{name}.* ?{reason}") as error:
        load(folder)
    assert "Fetch" in str(error.value) or "git lfs pull" in str(error.value)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b'{"metadata": {}}', b'{"weight_map": {"a": 1}}', b'{"weight_map": []}', b""], ids=str
)
def test_torn_index_is_named(folder: Path, content: bytes) -> None:
    (folder / INDEX_FILE).write_bytes(content)
    with pytest.raises(CorruptFile, match=rf"{INDEX_FILE} is not a checkpoint index.*Fetch that file again"):
        load(folder)


def test_several_files_without_an_index_are_named(folder: Path) -> None:
    (folder / INDEX_FILE).unlink()
    with pytest.raises(CorruptFile, match=rf"neither model.safetensors nor {INDEX_FILE}, but model-00001.*Fetch the index"):
        load(folder)


def test_shard_of_another_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = load_file(shard(folder))
    name = min(tensors)
    tensors[name] = torch.zeros(7, 5)
    save_file(tensors, shard(folder), metadata={"format": "pt"})
    monkeypatch.setattr("flexgen_helm.loading.checkpoint.StoredTensor.to", lambda *_: pytest.fail("read a tensor"))
    with pytest.raises(
        CorruptFile, match=rf"{shard(folder).name}: {name} has the shape \[7, 5\], but by the config .*\[\d+"
    ) as error:
        load(folder)
    assert "org/model" in str(error.value)


@pytest.mark.parametrize(("change", "reason"), [("drop", r"\[3, 64, 96\] instead of \[4, 64, 96\]"), ("shape", "stack|size")])
def test_expert_that_does_not_fit_is_named_with_its_file(bench: Workbench, tmp_path: Path, change: str, reason: str) -> None:
    """What only the conversion shows: experts become one tensor."""
    folder = Path(shutil.copytree(bench.folder("mixtral"), tmp_path / "model"))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors.pop(name) if change == "drop" else tensors.update({name: torch.zeros(64, 95)})
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptFile, match=rf"model\.safetensors.*model\.layers\.1\.mlp\.experts\.down_proj.*({reason})"):
        load(folder)


def test_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    tensors = read_tensors(folder)
    last = max((tensor for tensor in tensors.values() if tensor.file == shard(folder)), key=lambda tensor: tensor.start)
    truncate(last.start + 1)(folder)
    with pytest.raises(CorruptFile, match=rf"{last.file.name} ends inside the tensor {last.name}"):
        last.to("cpu", torch.bfloat16)


def test_unknown_number_format_is_named(folder: Path) -> None:
    edit_header(dtype="F4")(folder)
    with pytest.raises(UnsupportedModel, match=rf"{shard(folder).name}.* as F4"):
        load(folder)


@pytest.mark.parametrize("target", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_are_read_as_the_format_s_own_library_reads_them(
    tmp_path: Path, dtype: torch.dtype, target: torch.dtype | None
) -> None:
    generator = torch.Generator().manual_seed(11)
    large = PIECE_BYTES // dtype.itemsize * 2 + 77
    shapes: list[tuple[int, ...]] = [(), (1,), (0, 3), (5, 7), (large,), (3, large // 2, 1)]
    tensors = {str(shape): (torch.randn(shape, generator=generator) * 99).to(dtype) for shape in shapes}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_tensors(tmp_path)
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert sorted(stored) == sorted(file.keys())
        for name, tensor in stored.items():
            expected = file.get_tensor(name).to(target or dtype)
            found = tensor[...].to("cpu", target)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found, expected)


def test_byte_ranges_are_those_of_the_files(folder: Path) -> None:
    expected = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    stored = read_tensors(folder)
    assert stored.keys() == expected.keys()
    for name, tensor in stored.items():
        content = tensor.file.read_bytes()[tensor.start : tensor.start + tensor.num_bytes]
        assert content == expected[name].numpy().tobytes()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.11.mlp.experts.3.w1.weight", "model.layers.11"),
        ("transformer.h.0.attn.c_attn.bias", "transformer.h.0"),
        ("model.language_model.layers.2.self_attn.q_proj.weight", "model.language_model.layers.2"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("lm_head.weight", "lm_head.weight"),
    ],
)
def test_layer_of_a_tensor(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_grouping_follows_the_names_in_the_model(folder: Path) -> None:
    tensors = list(read_tensors(folder).values())
    groups = group_by_layer(tensors, lambda name: name.replace("model.layers.0", "decoder.layers.7"))
    assert {"decoder.layers.7", "model.layers.1", "lm_head.weight", "model.norm.weight"} <= groups.keys()
    assert sorted(tensor.name for group in groups.values() for tensor in group) == sorted(tensor.name for tensor in tensors)
    assert all(tensor.name.startswith("model.layers.0.") for tensor in groups["decoder.layers.7"])


def test_hundreds_of_shards_are_checked_in_a_moment(tmp_path: Path) -> None:
    names = [f"model-{number:05}-of-00400.safetensors" for number in range(400)]
    for number, name in enumerate(names):
        experts = {f"model.layers.{number}.mlp.experts.{expert}.w.weight": torch.zeros(2, 2) for expert in range(100)}
        save_file(experts, tmp_path / name)
    weight_map = {
        f"model.layers.{number}.mlp.experts.{e}.w.weight": name for number, name in enumerate(names) for e in range(100)
    }
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
    begin = time.thread_time()  # whatever else the machine does
    with opened_weight_files() as opened:
        assert len(read_tensors(tmp_path)) == 40_000
    assert len(opened) == 400
    assert time.thread_time() - begin < 10
