"""How far the files of a run are from those of the reference: every request, answer and statistic of every instance."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.helm.files import read, timeless
from tests.reference import PROMPT_TOLERANCE, TOKEN_TOLERANCE

Json = dict[str, Any]
BROKEN = "\ufffd"


@dataclass
class Agreement:
    """Counts and worst differences, in nats, over the runs that were added."""

    answers: int = 0
    tokens: int = 0
    ties: int = 0
    """Greedy answers that parted from the reference where its two best tokens were as good as equal."""
    boundary_draws: int = 0
    """Sampled answers that parted from the reference where the draw was close to a boundary."""
    broken_texts: int = 0
    """Answers whose bytes are no text, compared by their tokens: decoders replace such bytes in ways of their own."""
    worst_token: float = 0.0
    worst_prompt: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line for a report."""
        return (
            f"{self.answers} answers, {self.tokens} tokens, {self.ties} ties, {self.boundary_draws} boundary draws, "
            f"{self.broken_texts} broken texts, worst difference {self.worst_token:.1e} (generated), "
            f"{self.worst_prompt:.1e} (prompt), {len(self.failures)} failures"
        )

    def add_run(self, run: Path, reference: Path) -> None:
        """Compares two folders that HELM has written; statistics of instances whose answers parted are left out."""
        states, expected_states = (
            timeless(read(path, "", "scenario_state.json"))["request_states"] for path in (run, reference)
        )
        stats, expected_stats = (timeless(read(path, "", "per_instance_stats.json")) for path in (run, reference))
        assert (len(states), len(stats)) == (len(expected_states), len(expected_stats))
        parted = set()
        for state, expected in zip(states, expected_states, strict=True):
            if self._add_state(state, expected):
                parted.add(state["instance"]["id"])
        for stat, expected in zip(stats, expected_stats, strict=True):
            if stat["instance_id"] not in parted:
                self._add_stats(stat, expected)

    def _add_state(self, state: Json, expected: Json) -> bool:
        """Compares a request and its answers; whether an answer parted."""
        result, expected_result = state.pop("result"), expected.pop("result")
        completions, expected_completions = result.pop("completions"), expected_result.pop("completions")
        for request in (state["request"], expected["request"]):
            # The deployments differ on purpose.
            del request["model"], request["model_deployment"]
        self._expect(state, expected, "request")
        self._expect(result, expected_result, "result")
        self._expect(len(completions), len(expected_completions), "number of completions")
        pairs = zip(completions, expected_completions, strict=False)
        parted = [self._add_completion(*pair, state["request"]) for pair in pairs]
        return any(parted)

    def _add_completion(self, completion: Json, expected: Json, request: Json) -> bool:
        tokens, expected_tokens = completion.pop("tokens"), expected.pop("tokens")
        close = expected["finish_reason"].pop("close", [])
        equal = [a["text"] == b["text"] for a, b in zip(tokens, expected_tokens, strict=False)]
        common = [*equal, False].index(False)
        differences = [abs(a["logprob"] - b["logprob"]) for a, b in zip(tokens[:common], expected_tokens, strict=False)]
        self.answers += 1
        self.tokens += common
        self._add_differences(differences, request)
        if (all(equal), len(tokens)) == (True, len(expected_tokens)):
            self._add_whole(completion, expected, sum(token["logprob"] for token in tokens))
            return False
        if common not in close:
            self.failures.append(f"step {common}: {completion} {tokens} in place of {expected} {expected_tokens}")
        elif request["temperature"]:
            self.boundary_draws += 1
        else:
            self.ties += 1
        return True

    def _add_whole(self, completion: Json, expected: Json, logprob: float) -> None:
        self._expect(completion.pop("logprob"), logprob, "sum of log-probabilities")
        del expected["logprob"]
        if BROKEN in expected["text"]:
            self.broken_texts += 1
            completion.pop("text")
            expected.pop("text")
        self._expect(completion, expected, "text or finish reason")

    def _add_differences(self, differences: list[float], request: Json) -> None:
        worst = max(differences, default=0.0)
        if request["echo_prompt"]:
            self.worst_prompt = max(self.worst_prompt, worst)
        else:
            self.worst_token = max(self.worst_token, worst)
        if not worst <= (PROMPT_TOLERANCE if request["echo_prompt"] else TOKEN_TOLERANCE):
            self.failures.append(f"log-probabilities of {request['prompt'][-40:]!r} differ by {worst:.1e}")

    def _add_stats(self, stats: Json, expected: Json) -> None:
        values, expected_values = stats.pop("stats"), expected.pop("stats")
        self._expect(stats, expected, "instance")
        self._expect([value["name"] for value in values], [value["name"] for value in expected_values], "statistics")
        for value, expected_value in zip(values, expected_values, strict=False):
            # Mean, variance and deviation are functions of these, and magnify the last digits.
            for key in ("count", "sum", "sum_squared", "min", "max"):
                a, b = value.get(key), expected_value.get(key)
                if a != b and not abs(a - b) <= 1e-3 + 1e-4 * abs(b):
                    self.failures.append(f"{stats['instance_id']} {value['name']} {key}: {a} in place of {b}")

    def _expect(self, actual: Any, expected: Any, what: str) -> None:
        if actual != expected:
            self.failures.append(f"{what}: {actual} in place of {expected}")
