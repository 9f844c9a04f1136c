"""What docs/clients.md says to copy can be read by what it is for."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest
import yaml

from router.policy import Policy

PAGE = Path(__file__).parent.parent / "docs" / "clients.md"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
MODELS = re.compile(r"\bauto:(\w+)")


def blocks(language: str) -> list[str]:
    return [text for name, text in BLOCKS if name == language]


def example() -> Policy:
    tiers = yaml.safe_load(blocks("yaml")[0])
    targets = {name: {"echo": True} for name in ("frontier", "capable", "cheap", "tiny")}
    return Policy.model_validate({"version": 1, "targets": targets, **tiers})


def test_every_block_parses() -> None:
    assert {name for name, _ in BLOCKS} == {"yaml", "bash", "json", "js", "python"}
    for text in blocks("json"):
        json.loads(text)
    for text in blocks("yaml"):
        yaml.safe_load(text)
    for text in blocks("python"):
        ast.parse(text)


def test_every_mode_that_is_named_is_one_of_the_example_policy() -> None:
    modes = example().tiers["auto"].modes
    named = set(MODELS.findall(PAGE.read_text(encoding="utf-8")))
    assert named
    assert named <= set(modes)


@pytest.mark.parametrize(
    ("model", "tier"),
    [
        ("claude-haiku-4-5-20251001", "internal"),
        ("claude-sonnet-4-5", "auto"),
        ("gpt-5-mini", "internal"),
        ("gpt-5", "auto"),
        ("internal", "internal"),
    ],
)
def test_names_that_clients_hard_code_reach_their_tiers(model: str, tier: str) -> None:
    address = example().find(model)
    assert address is not None
    assert address.tier == tier


def test_the_contents_lead_somewhere() -> None:
    text = PAGE.read_text(encoding="utf-8")
    headings = {
        line.removeprefix("## ").lower().replace(" ", "-")
        for line in text.splitlines()
        if line.startswith("## ")
    }
    anchors = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert len(anchors) > 8
    assert anchors <= headings
