"""Prices of targets: the order of a ladder, and the dollars of rows whose source does not give them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from router.errors import DatasetError, UsageError
from training.dataset import CHARACTERS_A_TOKEN, Dataset


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float


def load_prices(path: Path) -> dict[str, Price]:
    """Read a YAML or JSON file: model → ``{input: …, output: …}``, US dollars per million tokens.

    Raises
    ------
    UsageError
        The file is missing.
    DatasetError
        It is not of this form.
    """
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise DatasetError(f"{path}: not readable as YAML or JSON") from None
    if not isinstance(raw, dict) or not raw:
        raise DatasetError(
            f"{path}: expected a map from model to {{input: USD, output: USD}} per million tokens"
        )
    prices = {}
    for model, entry in raw.items():
        try:
            price = Price(input=float(entry["input"]), output=float(entry["output"]))
        except (TypeError, KeyError, ValueError):
            price = Price(input=-1.0, output=-1.0)
        if not (0 <= price.input < math.inf and 0 <= price.output < math.inf):
            raise DatasetError(f"{path}: {model}: expected input and output in US dollars per million tokens")
        prices[str(model)] = price
    return prices


def by_price(targets: tuple[str, ...], prices: Mapping[str, Price]) -> tuple[str, ...]:
    """Targets from the cheapest to the dearest, by the price of output, then of input."""
    _check(targets, prices)
    return tuple(sorted(targets, key=lambda t: (prices[t].output, prices[t].input)))


def with_costs(dataset: Dataset, prices: Mapping[str, Price]) -> Dataset:
    """Fill in the costs that rows lack.

    Input tokens are estimated from the characters of the conversation (four a token). A row without output tokens for a
    target gets that target's mean over the rows that have them.

    Raises
    ------
    UsageError
        A target has no price, or no row has its output tokens.
    """
    _check(dataset.targets, prices)
    read = np.array([p.state.characters for p in dataset.prompts]) / CHARACTERS_A_TOKEN
    cost = dataset.cost.copy()
    for t, target in enumerate(dataset.targets):
        written = dataset.output_tokens[:, t]
        missing = np.isnan(cost[:, t])
        if not missing.any():
            continue
        if np.isnan(written).all():
            raise UsageError(
                f"no row has output_tokens for {target}: its cost cannot be told from prices; add output_tokens or cost"
            )
        written = np.where(np.isnan(written), np.nanmean(written), written)
        price = prices[target]
        cost[missing, t] = ((read * price.input + written * price.output) / 1e6)[missing]
    return replace(dataset, cost=cost)


def _check(targets: tuple[str, ...], prices: Mapping[str, Price]) -> None:
    missing = [target for target in targets if target not in prices]
    if missing:
        raise UsageError(f"no price for {', '.join(missing)}; the file has {', '.join(prices)}")
