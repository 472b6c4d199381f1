"""The command line: what is asked of the engine, what is printed, and how errors look."""

from __future__ import annotations

import argparse
import ast
import io
import json
import logging
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from flexgen_helm import Engine
from flexgen_helm.cli import main
from flexgen_helm.errors import UnsupportedModel
from flexgen_helm.runtime import progress
from flexgen_helm.types import Completion, Job, Result


class FakeEngine:
    """Answers every prompt with its own words in reverse."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []
        self.closed = False

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *error: object) -> None:
        self.closed = True

    def run(self, jobs: Sequence[Job]) -> list[Result]:
        self.jobs += jobs
        return [self._answer(job) for job in jobs]

    def _answer(self, job: Job) -> Result:
        text = " ".join(reversed((job.prompt or "").split()))
        completion = Completion(text, [4], [text], [-0.5], [[]], "length", 1)
        return Result([completion] * job.num_completions, prompt_token_ids=[1, 2])


def run(*arguments: str, engine: object = None) -> int:
    return main(["generate", "--model", "m", *arguments], load_engine=lambda _: engine or FakeEngine())  # type: ignore[arg-type, return-value]


def test_text_is_printed_and_the_engine_closed(capsys: pytest.CaptureFixture[str]) -> None:
    engine = FakeEngine()
    assert run("--prompt", "one two", engine=engine) == 0
    assert capsys.readouterr() == ("two one\n", "m: 1 prompts, 1 completions of at most 16 tokens\n")
    assert engine.closed


def test_options_reach_the_job() -> None:
    engine = FakeEngine()
    options = "--max-new-tokens 7 --temperature 0.5 --top-p 0.9 --seed 3 --num-completions 2 --stop a --stop bc"
    run("--prompt", "x", *options.split(), engine=engine)
    expected = Job(prompt="x", max_new_tokens=7, temperature=0.5, top_p=0.9, seed=3, num_completions=2, stop=("a", "bc"))
    assert engine.jobs == [expected]


def test_several_completions_are_told_apart(capsys: pytest.CaptureFixture[str]) -> None:
    run("--prompt", "a b", "--prompt", "c d", "--num-completions", "2")
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["b a", "b a", "d c", "d c"]
    assert len({line for line in lines if line.startswith("---")}) == 4


def test_json_has_one_object_for_each_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    run("--prompt", "a é", "--prompt", "c", "--json")
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["prompt"] == "a é"
    assert first["completions"][0]["text"] == "é a"
    assert first["completions"][0]["finish_reason"] == "length"
    assert second["prompt_token_ids"] == [1, 2]


def test_prompt_file_is_one_prompt(tmp_path: Path) -> None:
    engine = FakeEngine()
    file = tmp_path / "prompt.txt"
    file.write_text("two\nlines\n", encoding="utf-8")
    run("--prompt", "first", "--prompt-file", str(file), engine=engine)
    assert [job.prompt for job in engine.jobs] == ["first", "two\nlines\n"]


CONTENTS = {
    b"one line": "one line",
    b"two\nlines\n": "two\nlines\n",
    b"Windows\r\nlines\r\n": "Windows\r\nlines\r\n",
    b"old\rMac\r": "old\rMac\r",
    b"\xef\xbb\xbfmark": "mark",
    b"\xef\xbb\xbf\xef\xbb\xbftwo marks": "\ufefftwo marks",
    b"inside\xef\xbb\xbf": "inside\ufeff",
    "naïve 日本\x00\x85\u2028".encode(): "naïve 日本\x00\x85\u2028",
    b" \n": " \n",
}
REFUSED = {
    b"": "is empty",
    b"\xef\xbb\xbf": "is empty",
    b"caf\xe9": "cannot be read.*0xe9",
    b"\xff\xfea\0": "cannot be read.*0xff",
}


def give(content: bytes, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Puts bytes into a file or on standard input; returns the argument that names them."""
    if source == "file":
        (tmp_path / "prompt").write_bytes(content)
        return str(tmp_path / "prompt")
    # What Python makes of line ends and of the locale's encoding must not matter.
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1", newline=None))
    return "-"


@pytest.mark.parametrize("source", ["file", "standard input"])
@pytest.mark.parametrize("content", CONTENTS)
def test_the_same_bytes_are_the_same_prompt(
    content: bytes, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = FakeEngine()
    assert run("--prompt-file", give(content, source, tmp_path, monkeypatch), engine=engine) == 0
    assert [job.prompt for job in engine.jobs] == [CONTENTS[content]]


@pytest.mark.parametrize("source", ["file", "standard input"])
@pytest.mark.parametrize("content", REFUSED)
def test_bytes_that_are_no_prompt_are_refused(
    content: bytes, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine()
    assert run("--prompt-file", give(content, source, tmp_path, monkeypatch), engine=engine) == 2
    assert not engine.jobs
    message = capsys.readouterr().err
    assert re.search(rf"(standard input|/prompt) {REFUSED[content]}.* Give UTF-8 text\.\n$", message)


def test_errors_are_one_line_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(args: argparse.Namespace) -> FakeEngine:
        raise UnsupportedModel(f"{args.model} is refused,\n  because. Do this.")

    assert main(["generate", "--model", "m", "--prompt", "x"], load_engine=refuse) == 2  # type: ignore[arg-type]
    printed, complaint = capsys.readouterr()
    assert (printed, complaint.splitlines()[1:]) == ("", ["flexgen-helm: m is refused, because. Do this."])


def test_an_interrupt_is_one_line_that_promises_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Interrupted(FakeEngine):
        def run(self, jobs: Sequence[Job]) -> list[Result]:
            raise KeyboardInterrupt

    engine = Interrupted()
    assert run("--prompt", "x", engine=engine) == 130
    assert engine.closed
    line = "flexgen-helm: interrupted. The same command starts again from the beginning."
    assert capsys.readouterr().err.splitlines()[1:] == [line]


def test_lines_of_progress_are_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(FakeEngine):
        def run(self, jobs: Sequence[Job]) -> list[Result]:
            logging.getLogger(progress.__name__).info("%s", "half of it")
            return super().run(jobs)

    for _ in range(2):
        assert run("--prompt", "x", engine=Slow()) == 0
        assert capsys.readouterr().err.splitlines()[1:] == ["half of it"]


@pytest.mark.parametrize("rows", ["auto", "packed", "single"])
def test_rows_reach_the_engine(rows: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(name_or_path: str, **options: Any) -> FakeEngine:
        asked.update(options)
        return FakeEngine()

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    options = [] if rows == "auto" else ["--rows", rows]
    assert main(["generate", "--model", "m", "--prompt", "x", "--device", "cpu", *options]) == 0
    assert asked["rows"] == rows


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["bench"]])
def test_a_variant_is_named_with_the_model(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In its canonical form, in which it is printed too."""
    asked: list[str] = []

    def from_pretrained(name_or_path: str, **options: Any) -> FakeEngine:
        asked.append(name_or_path)
        raise UnsupportedModel("seen enough")

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    assert main([*command, "--model", "org/model@w3.5-entropy", "--device", "cpu"]) == 2
    assert asked == ["org/model@w3-entropy"]
    assert capsys.readouterr().err.startswith("org/model@w3-entropy: ")
    assert main([*command, "--model", "org/model@w5", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.startswith("flexgen-helm: There is no variant `@w5` of a model. There are `w2`")


def test_a_check_is_repeated_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def from_pretrained(name_or_path: str, **options: Any) -> FakeEngine:
        asked.append(options.get("recheck", False))
        return FakeEngine()

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    for options in ([], ["--recheck"]):
        assert main(["generate", "--model", "m", "--prompt", "x", "--device", "cpu", *options]) == 0
    assert asked == [False, True]


def test_a_verbose_command_says_what_starting_took(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def from_pretrained(name_or_path: str, **options: Any) -> FakeEngine:
        logging.getLogger("flexgen_helm.rows").info("what the engine chose")
        return FakeEngine()

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    asked, seconds = "m: 1 prompts, 1 completions of at most 16 tokens", r"m: \d+\.\d s of imports, \d+\.\d s of loading"
    for options, more in ([], []), (["-v"], ["what the engine chose", seconds]):
        assert main(["generate", "--model", "m", "--prompt", "x", "--device", "cpu", *options]) == 0
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 + len(more)
        assert all(re.fullmatch(pattern, line) for pattern, line in zip([asked, *more], lines, strict=True))


@pytest.mark.parametrize("command", [["generate", "--prompt", "x"], ["bench"]])
def test_placement_reaches_the_engine(command: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def from_pretrained(name_or_path: str, **options: Any) -> FakeEngine:
        asked.update(options)
        raise UnsupportedModel("seen enough")

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    policy = ["--policy", "weights=0.2:0.3:0.5,prefetch=3", "--max-memory", "device=15GiB,host=9GiB"]
    options = [*policy, "--offload-folder", str(tmp_path), "--kv-dtype", "bfloat16"]
    if command == ["bench"]:
        options += ["--dummy-weights", "--order", "row"]
    assert main([*command, "--model", "m", "--device", "cpu", *options]) == 2
    assert (asked["policy"].weights, asked["policy"].prefetch) == ((0.2, 0.3, 0.5), 3)
    assert asked["policy"].gpu_batch_size % 16 == 0
    assert (asked["max_memory"], asked["offload_folder"]) == ({"device": "15GiB", "host": "9GiB"}, tmp_path)
    assert asked["kv_dtype"] == "bfloat16"
    assert (asked.get("dummy_weights"), asked.get("order")) == ((True, "row") if command == ["bench"] else (None, None))


def test_slab_coding_joins_the_policy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[Any] = []

    def from_pretrained(name_or_path: str, **options: Any) -> FakeEngine:
        asked.append(options["policy"])
        raise UnsupportedModel("seen enough")

    monkeypatch.setattr(Engine, "from_pretrained", from_pretrained)
    command = ["generate", "--prompt", "x", "--model", "m", "--device", "cpu"]
    for options, coding, prefetch in (
        ([], "auto", 1),
        (["--slab-coding", "lossless"], "lossless", 1),
        (["--slab-coding", "plain", "--policy", "prefetch=3"], "plain", 3),
        (["--policy", "slab_coding=plain"], "plain", 1),
    ):
        assert main([*command, *options]) == 2
        assert (asked[-1].slab_coding, asked[-1].prefetch) == (coding, prefetch)
    capsys.readouterr()
    assert main([*command, "--slab-coding", "plain", "--policy", "slab_coding=lossless"]) == 2
    assert "--slab-coding is plain, but --policy says lossless. Leave one out." in capsys.readouterr().err


def test_a_policy_that_cannot_be_read_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--prompt", "x", "--policy", "weights=half") == 2
    assert capsys.readouterr().err.startswith("flexgen-helm: The policy 'weights=half' cannot be read.")


def test_there_are_two_kinds_of_rows(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run("--prompt", "x", "--rows", "both")
    message = capsys.readouterr().err
    assert all(word in message for word in ("--rows", "both", "auto", "packed", "single"))


@pytest.mark.parametrize("arguments", [[], ["--prompt-file", "/no/such/file"], ["--prompt-file", sys.executable]])
def test_missing_prompts_are_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out.split() == ["flexgen-helm", version("flexgen_helm")]


@pytest.mark.parametrize(
    ("command", "option"),
    [("generate", "--prompt-file"), ("eval", "--suite"), ("bench", "--gen-len"), ("fidelity", "--candidate")],
)
def test_help_loads_no_torch(command: str, option: str) -> None:
    code = "import sys\nfrom flexgen_helm.cli import main\ntry: main(sys.argv[1:])\nfinally: print(sorted(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code, command, "--help"], capture_output=True, text=True, check=True)
    assert option in process.stdout
    modules = ast.literal_eval(process.stdout.splitlines()[-1])
    assert "flexgen_helm.cli" in modules
    assert not {"torch", "transformers", "numpy"} & set(modules)


@pytest.mark.slow
def test_real_model_continues_a_prompt(real_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The reference is what transformers' generate gives for this prompt."""
    folder = str(real_model)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    expected = str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    capfd.readouterr()
    options = ["--prompt", "The capital of France is", "--max-new-tokens", "6", "--device", "cpu"]
    assert main(["generate", "--model", folder, *options]) == 0
    assert capfd.readouterr().out == expected + "\n"
    assert main(["generate", "--model", folder, "--prompt", "x", "--max-new-tokens", "9000"]) == 2
    message = capfd.readouterr().err.splitlines()[-1]
    assert message.startswith("flexgen-helm: ")
    assert "8192" in message
