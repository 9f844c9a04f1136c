"""A benchmark's JSON, read back as what the pictures are drawn from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from router.errors import DatasetError
from training.comparison import FITTED
from training.guarantee_study import GuaranteeStudy, LossFigures, RuleFigures
from training.ladder import LadderReport
from training.metrics import Calibration, CalibrationFigures, ReliabilityBin
from training.sweep import LadderFigures


@dataclass(frozen=True)
class Results:
    """What :mod:`training.plot` draws of a benchmark; titles are keys.

    Attributes
    ----------
    curves : mapping of str to mapping of str to ndarray, shape (2, points)
        Of each drawn comparison and method: mean quality at even strong shares, and its standard deviation over runs.
    calibration : mapping of str to Calibration
        Of the same comparisons' learned router.
    few_rows : mapping of str to mapping of str to sequence of (rows, APGR, standard deviation)
        Of each comparison that was also learned from few rows, and of each fitted method.
    guarantees : mapping of str to GuaranteeStudy
    ladders : mapping of str to LadderReport
    """

    curves: Mapping[str, Mapping[str, NDArray[np.float64]]]
    calibration: Mapping[str, Calibration]
    few_rows: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]]
    guarantees: Mapping[str, GuaranteeStudy]
    ladders: Mapping[str, LadderReport]


def read_results(path: Path) -> Results:
    """Read what ``router-train benchmark --json`` wrote.

    Raises
    ------
    DatasetError
        The file is not such a one.
    """
    try:
        return results_of(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DatasetError(f"{path}: is not the JSON of router-train benchmark ({error})") from None


def results_of(found: Mapping[str, Any]) -> Results:
    """The same of :meth:`training.benchmark.Benchmark.as_dict`."""
    drawn = {table["title"]: table for table in found["tables"] if table["drawn"]}
    return Results(
        curves={
            title: {
                name: np.array([line["curve"]["quality"], line["curve"]["sd"]])
                for name, line in table["methods"].items()
                if line["curve"]
            }
            for title, table in drawn.items()
        },
        calibration={title: _calibration(table["calibration"]) for title, table in drawn.items()},
        few_rows=_few_rows(found["tables"]),
        guarantees={study["title"]: _guarantee(study["found"]) for study in found["guarantee"]},
        ladders={study["title"]: _ladder(study["found"]) for study in found["ladder"]},
    )


def _few_rows(
    tables: Sequence[Mapping[str, Any]],
) -> dict[str, dict[str, list[tuple[int, float, float]]]]:
    """Of the tables named ``<name>-<rows>`` and of ``<name>`` itself, under its title."""
    by_name = {table["name"]: table for table in tables}
    families: dict[str, list[Mapping[str, Any]]] = {}
    for table in tables:
        name, _, rows = table["name"].rpartition("-")
        if rows.isdecimal():
            families.setdefault(name, [by_name[name]] if name in by_name else []).append(table)
    points: dict[str, dict[str, list[tuple[int, float, float]]]] = {}
    for name, family in families.items():
        of = points.setdefault(by_name[name]["title"] if name in by_name else name, {})
        for table in family:
            for method in (*FITTED, "average"):
                line = table["methods"].get(method, {})
                if line.get("apgr") is not None:  # there is a gap to recover
                    of.setdefault(method, []).append(
                        (table["train_rows"], line["apgr"], line["apgr_sd"] or 0.0)
                    )
    return points


def _calibration(found: Mapping[str, Any]) -> Calibration:
    return Calibration({name: _head(of) for name, of in found["quality"].items()}, _head(found["gain"]))


def _head(found: Mapping[str, Any]) -> CalibrationFigures:
    auc = math.nan if found["auc"] is None else found["auc"]
    bins = tuple(ReliabilityBin(**part) for part in found["bins"])
    return CalibrationFigures(**{**found, "auc": auc, "bins": bins})


def _guarantee(found: Mapping[str, Any]) -> GuaranteeStudy:
    losses = tuple(
        LossFigures(**{**at, "promised": RuleFigures(**at["promised"]), "tuned": RuleFigures(**at["tuned"])})
        for at in found["losses"]
    )
    return GuaranteeStudy(**{**found, "losses": losses})


def _ladder(found: Mapping[str, Any]) -> LadderReport:
    known = {field.name for field in fields(LadderReport)}
    return LadderReport(
        **{name: value for name, value in found.items() if name in known}
        | {
            "targets": tuple(found["targets"]),
            "methods": {name: LadderFigures(**of) for name, of in found["methods"].items()},
            "by_source": {name: _ladder(part) for name, part in found["by_source"].items()},
        }
    )
