from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import write_jsonl

from router.errors import DatasetError, RouterError, UsageError
from training.dataset import Dataset, load_dataset
from training.prices import Price, by_price, load_prices, with_costs


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "prices.yaml"


def dataset(tmp_path: Path, *rows: dict[str, Any]) -> Dataset:
    path = tmp_path / "rows.jsonl"
    labelled = [
        {"prompt": "p" * 400, "quality": {"small": i % 2, "large": 1}, **row} for i, row in enumerate(rows)
    ]
    write_jsonl(path, labelled)
    return load_dataset([path], targets=["small", "large"])


PRICES = {"small": Price(0.5, 2.0), "large": Price(5.0, 25.0)}


def test_prices_are_read_from_yaml_and_json(file: Path) -> None:
    file.write_text("small: {input: 0.1, output: 0.4}\nopenai/large:\n  input: 5\n  output: 25\n")
    assert load_prices(file) == {"small": Price(0.1, 0.4), "openai/large": Price(5.0, 25.0)}
    file.write_text('{"small": {"input": 0, "output": 0}}')
    assert load_prices(file) == {"small": Price(0.0, 0.0)}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "small: 3",
        "small: {input: 1}",
        "small: {input: -1, output: 2}",
        "small: {input: .nan, output: 2}",
        "small: {input: 1, output: .inf}",
        "small: {input: cheap, output: 2}",
        "small: {input: null, output: 2}",
        "a: [",
        "\x00",
    ],
)
def test_prices_that_cannot_be_used_are_one_clear_error(file: Path, text: str) -> None:
    file.write_text(text)
    with pytest.raises(DatasetError, match=r"prices\.yaml") as caught:
        load_prices(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_a_wrong_call(tmp_path: Path) -> None:
    for path in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read") as caught:
            load_prices(path)
        assert caught.value.exit_code == 2


def test_targets_by_price_of_output_then_of_input() -> None:
    prices = {"a": Price(1, 9), "b": Price(3, 4), "c": Price(2, 4)}
    assert by_price(("a", "b", "c"), prices) == ("c", "b", "a")
    with pytest.raises(UsageError, match="no price for d; the file has a, b, c"):
        by_price(("a", "d"), prices)


def test_costs_are_tokens_times_prices(tmp_path: Path) -> None:
    # 400 characters are 100 tokens.
    rows = dataset(
        tmp_path,
        {"output_tokens": {"small": 50, "large": 200}},
        {"output_tokens": {"small": 150, "large": 400}, "cost": {"small": 0.125}},
        {"output_tokens": {"large": 600}},
    )
    cost = with_costs(rows, PRICES).cost
    assert cost[:, 1] == pytest.approx([(100 * 5 + n * 25) / 1e6 for n in (200, 400, 600)])
    # A cost that a row has stays; tokens that it has not are the mean of the others.
    assert cost[:, 0] == pytest.approx([(100 * 0.5 + 50 * 2) / 1e6, 0.125, (100 * 0.5 + 100 * 2) / 1e6])
    assert np.isnan(rows.cost).sum() == 5  # what was given is as it was


def test_costs_that_are_all_known_need_no_tokens(tmp_path: Path) -> None:
    rows = dataset(tmp_path, {"cost": {"small": 0.1, "large": 0.2}}, {"cost": {"small": 0.3, "large": 0.4}})
    assert with_costs(rows, PRICES).cost.tolist() == [[0.1, 0.2], [0.3, 0.4]]


@pytest.mark.parametrize(
    ("prices", "named"),
    [({"small": Price(1, 1)}, "no price for large"), (PRICES, "no row has output_tokens for large")],
)
def test_what_cannot_be_told_is_one_clear_error(tmp_path: Path, prices: dict[str, Price], named: str) -> None:
    rows = dataset(tmp_path, {"output_tokens": {"small": 5}}, {})
    with pytest.raises(RouterError, match=named):
        with_costs(rows, prices)
