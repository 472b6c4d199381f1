"""Run folders as HELM and this package write them, of answers that a test chooses."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METRICS = {"multiple_choice_joint": "exact_match", "generation": "exact_match", "language_modeling": "bits_per_byte"}
NUMERICS = {
    "weights": {"digest": "0123456789abcdef", "dtype": "float32", "scheme": "plain", "statistics": ""},
    "cache": {"dtype": "float32", "format": "plain", "sparsity": 1.0},
    "rows": {"kind": "packed", "gpu_batch_size": 64, "gpu_batch_tokens": 512},
    "machine": {"device": "cpu", "attention": "device", "matmul": "mkl", "compiled": False},
    "engine": 5,
}


@dataclass(frozen=True)
class Answer:
    """What a model does with one instance."""

    text: str = "A"
    """Generated text; of scored choices it does not matter."""
    score: float = 1.0
    logprobs: Sequence[float] = (-1.0,)
    """Of the answer's tokens; of scored choices, one for each choice; of a window, one for each of its tokens."""
    prompt: str = "Question: {instance}\nAnswer:"
    perturbation: dict[str, Any] | None = None
    trial: int = 0
    split: str = "test"
    instance: str | None = None


@dataclass(frozen=True)
class Suite:
    """A folder of runs of one model."""

    folder: Path
    deployment: str = "flexgen/org/model"
    record: dict[str, Any] | None = field(default_factory=dict)
    """Changes of `record_of`; None: another client served the runs."""

    def run(
        self,
        scenario: str,
        answers: Sequence[Answer],
        *,
        method: str = "multiple_choice_joint",
        groups: Sequence[str] = ("mmlu",),
        choices: Sequence[str] = ("one", "two", "three", "four"),
    ) -> Path:
        """Writes a run in which choice 0 is right."""
        short = self.deployment.removeprefix("flexgen/").replace("/", "_")
        folder = self.folder / f"{scenario}{',' if ':' in scenario else ':'}model={short}"
        folder.mkdir(parents=True)
        spec = {
            "name": folder.name,
            "groups": list(groups),
            "adapter_spec": {"model_deployment": self.deployment, "model": short, "method": method},
            "scenario_spec": {"class_name": "helm.benchmark.scenarios.mmlu_scenario.MMLUScenario", "args": {"subject": "x"}},
        }
        numbered = [(answer.instance or f"id{number}", answer) for number, answer in enumerate(answers)]
        states = [state for name, answer in numbered for state in self._states(name, answer, method, choices)]
        per_instance = [self._stats(name, answer, method) for name, answer in numbered]
        metric = METRICS.get(method, "exact_match")
        total = sum(answer.score for answer in answers)
        stats = [{"name": {"name": metric, "split": "test"}, "count": len(answers), "sum": total, "mean": total / len(answers)}]
        contents = {
            "run_spec": spec,
            "scenario": {},
            "scenario_state": {"request_states": states},
            "stats": stats,
            "per_instance_stats": per_instance,
        }
        for name, content in contents.items():
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2))
        if self.record is not None:
            (folder / "flexgen.json").write_text(json.dumps(record_of(self.deployment, **self.record)))
        return folder

    def _states(self, name: str, answer: Answer, method: str, choices: Sequence[str]) -> list[dict[str, Any]]:
        prompt = answer.prompt.format(instance=name)
        instance: dict[str, Any] = {
            "id": name,
            "split": answer.split,
            "input": {"text": name},
            "references": [
                {"output": {"text": text}, "tags": ["correct"] if not at else []} for at, text in enumerate(choices)
            ],
        }
        if answer.perturbation is not None:
            instance["perturbation"] = answer.perturbation
        asked = {"model": "m", "model_deployment": self.deployment, "prompt": prompt, "temperature": 0.0, "max_tokens": 4}
        common = {"instance": instance, "train_trial_index": answer.trial}
        if method == "multiple_choice_separate_original":
            return [
                {
                    **common,
                    "reference_index": at,
                    "request_mode": "original",
                    "request": {**asked, "prompt": f"{prompt} {text}", "max_tokens": 0, "echo_prompt": True},
                    "result": _result([(prompt, -9.0), (f" {text}", answer.logprobs[at])]),
                }
                for at, text in enumerate(choices)
            ]
        if method == "language_modeling":
            asked.update(max_tokens=0, echo_prompt=True)
            return [{**common, "request": asked, "result": _result([("x", value) for value in answer.logprobs])}]
        pieces = [answer.text, *[""] * (len(answer.logprobs) - 1)]
        state = {**common, "request": asked, "result": _result(list(zip(pieces, answer.logprobs, strict=True)))}
        if method == "multiple_choice_joint":
            state["output_mapping"] = dict(zip("ABCD", choices, strict=False))
        return [state]

    @staticmethod
    def _stats(name: str, answer: Answer, method: str) -> dict[str, Any]:
        values = {METRICS.get(method, "exact_match"): answer.score, "num_prompt_tokens": 10.0}
        if method == "language_modeling":
            values = {"logprob": math.fsum(answer.logprobs), "num_bytes": float(len(answer.logprobs))}
        if method == "multiple_choice_separate_original":
            values["predicted_index"] = float(max(range(len(answer.logprobs)), key=lambda at: answer.logprobs[at]))
        perturbation = {} if answer.perturbation is None else {"perturbation": answer.perturbation}
        stats = [
            {"name": {"name": key, "split": answer.split, **perturbation}, "count": 1, "sum": value, "mean": value}
            for key, value in values.items()
        ]
        return {"instance_id": name, "train_trial_index": answer.trial, "stats": stats, **perturbation}


def _result(tokens: Sequence[tuple[str, float]]) -> dict[str, Any]:
    completion = {
        "text": "".join(text for text, _ in tokens),
        "logprob": sum(value for _, value in tokens),
        "tokens": [{"text": text, "logprob": value} for text, value in tokens],
        "finish_reason": {"reason": "length"},
    }
    return {"success": True, "completions": [completion], "cached": False, "request_time": 0.1}


def record_of(deployment: str, *, scheme: str = "plain", **changes: Any) -> dict[str, Any]:
    """Returns what `flexgen.json` holds for a model that was released in 16 bits and is computed in float32."""
    variant = deployment.partition("@")[2] or None
    stats = {"prompt_tokens_computed": 900, "generated_tokens": 100, "seconds": 2.0}
    return {
        "deployment": deployment,
        "model": deployment.removeprefix("flexgen/").partition("@")[0],
        "variant": variant,
        "released_dtype": "bfloat16",
        "numerics": {**NUMERICS, "weights": {**NUMERICS["weights"], "scheme": scheme}},  # type: ignore[dict-item]
        "bits_per_weight": 12.0 if variant else 32.0,
        "bits_per_compressed_weight": 4.5 if variant else None,
        "bits_per_cache_element": 5.5 if variant else 32.0,
        "bits_per_k_element": 5.0 if variant else 32.0,
        "bits_per_v_element": 6.0 if variant else 32.0,
        "weight_bytes": {"device": 1000, "host": 0, "disk": 0},
        "cache_bytes": {"device": 4000, "host": 0, "disk": 0},
        "bit_stable": True,
        "measured": {"date": "2026-11-29T13:31:07.817+00:00", "roofline_efficiency": 0.5, "stats": stats},
        **changes,
    }
