"""RouteLLM's evaluation sets: MMLU, GSM8K and MT-Bench with the answers of a weak and a strong model.

https://github.com/lm-sys/RouteLLM, ``routellm/evals`` (arXiv 2406.18665). Rows are left out as RouteLLM does:
where the prompt equals an ``eval_prompt`` of ``contaminated_prompts.jsonl``, exactly.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from router.errors import DatasetError, UsageError
from training.dataset import estimated_tokens
from training.sources.reading import Reading, Row, files_of, number, read_rows, required

_CONTAMINATED = "contaminated_prompts.jsonl"
_RESPONSE = "_response"


def read_mmlu(path: Path) -> Reading:
    """MMLU: the folder of ``mmlu_<subject>.csv``, or one; correct or not. The subject is the domain."""
    rows, left_out = [], Counter[str]()
    files = files_of(path, "mmlu_*.csv")
    contaminated, notes = _contaminated(files[0].parent)
    for file in files:
        subject = file.stem.removeprefix("mmlu_")
        for position, (line, fields) in enumerate(read_rows(file)):
            prompt = required(fields, "prompt", file, line)
            if prompt in contaminated:
                left_out["contaminated"] += 1
                continue
            quality = {name: number(v, name, file, line) for name, v in fields.items() if name != "prompt"}
            rows.append(
                {
                    "id": f"routellm-mmlu/{subject}/{position}",
                    "prompt": prompt,
                    "source": "routellm-mmlu",
                    "domain": subject,
                    "quality": quality,
                }
            )
    return Reading(tuple(rows), left_out, notes)


def read_gsm8k(path: Path) -> Reading:
    """GSM8K: ``gsm8k_responses.csv`` or its folder; correct or not, output tokens by length."""
    rows, left_out = [], Counter[str]()
    (file,) = files_of(path, "gsm8k_responses.csv")[:1]
    contaminated, notes = _contaminated(file.parent)
    for position, (line, fields) in enumerate(read_rows(file)):
        prompt = required(fields, "prompt", file, line)
        if prompt in contaminated:
            left_out["contaminated"] += 1
            continue
        models = [name for name in fields if name != "prompt" and not name.endswith(_RESPONSE)]
        responses = {name: fields.get(name + _RESPONSE) for name in models}
        rows.append(
            {
                "id": f"routellm-gsm8k/{position}",
                "prompt": prompt,
                "source": "routellm-gsm8k",
                "domain": "mathematics",
                "quality": {name: number(fields[name], name, file, line) for name in models},
                "output_tokens": {name: estimated_tokens(text) for name, text in responses.items() if text},
            }
        )
    return Reading(tuple(rows), left_out, notes)


def read_mtbench(path: Path) -> Reading:
    """MT-Bench: the folder with ``question.jsonl`` and ``judgements.jsonl``.

    A row is a question's first turn, which is what is routed; its quality is the judge's 1 to 10, scaled
    (x − 1) / 9 and averaged over both turns. The category is the domain.
    """
    folder = path if path.is_dir() else path.parent
    questions, judgements = folder / "question.jsonl", folder / "judgements.jsonl"
    for file in (questions, judgements):
        if not file.is_file():
            raise UsageError(f"{file}: no such file; MT-Bench needs question.jsonl and judgements.jsonl")
    contaminated, notes = _contaminated(folder)
    scores: defaultdict[tuple[str, str], list[float]] = defaultdict(list)
    for line, fields in read_rows(judgements):
        score = number(required(fields, "score", judgements, line), "score", judgements, line)
        if not 1 <= score <= 10:
            raise DatasetError(f"{judgements}:{line}: score: {score:g} is not between 1 and 10")
        question = str(required(fields, "question_id", judgements, line))
        scores[question, str(required(fields, "model", judgements, line))].append((score - 1) / 9)
    models = list(dict.fromkeys(model for _, model in scores))
    rows: list[Row] = []
    left_out = Counter[str]()
    for line, fields in read_rows(questions):
        turns = required(fields, "turns", questions, line)
        if not contaminated.isdisjoint(turns):
            left_out["contaminated"] += 1
            continue
        question = str(required(fields, "question_id", questions, line))
        judged = {model: scores[question, model] for model in models if (question, model) in scores}
        rows.append(
            {
                "id": f"routellm-mtbench/{question}",
                "prompt": turns[0],
                "source": "routellm-mtbench",
                "domain": fields.get("category"),
                "quality": {model: sum(values) / len(values) for model, values in judged.items()},
            }
        )
    return Reading(tuple(rows), left_out, notes)


def _contaminated(folder: Path) -> tuple[frozenset[str], tuple[str, ...]]:
    """The prompts to leave out. In RouteLLM's repository MMLU's list stands one folder above the answers."""
    for file in (folder / _CONTAMINATED, folder.parent / _CONTAMINATED):
        if file.is_file():
            prompts = (required(fields, "eval_prompt", file, line) for line, fields in read_rows(file))
            return frozenset(prompts), ()
    return frozenset(), (f"{_CONTAMINATED} is not in {folder}: contaminated prompts could not be left out",)
