"""Scores of simple methods, to stand beside a learned router's on the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import vstack
from scipy.special import expit
from sklearn.cluster import KMeans
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits

from router.predictor import unit_rows
from training.dataset import Dataset
from training.metrics import oracle_scores, random_router_scores

Floats = NDArray[np.float64]
Embeddings = NDArray[np.floating[Any]]

# Nearest neighbours that the gain is averaged over.
NEIGHBOURS = 100
# Test rows whose similarities to all training rows are held at once: 512 × 14,000 float32 are 29 MB.
_CHUNK = 512
# Avengers-Pro's number of clusters, of the nearest ones that are averaged, and how fast a cluster's weight falls with
# its distance (arXiv 2508.12631 and its released configuration); on few rows a cluster holds ROWS_A_CLUSTER on average.
CLUSTERS, NEAREST_CLUSTERS, SHARPNESS = 60, 4, 9.0
ROWS_A_CLUSTER = 20
# Length of a model's embedding in the matrix factorisation, and how much its parameters are drawn to zero.
FACTORS = 16
FACTOR_PENALTY = 3.0


class Baseline(Protocol):
    """A method that scores test rows, having seen training rows; higher goes to strong first."""

    def __call__(
        self,
        train: Dataset,
        test: Dataset,
        train_embeddings: Embeddings,
        test_embeddings: Embeddings,
        seed: int,
    ) -> Floats:
        """Score the test rows.

        Parameters
        ----------
        train, test : Dataset
            Two targets, weak and strong in this order; each labelled for both on every row.
        train_embeddings : ndarray, shape (n_train, d)
        test_embeddings : ndarray, shape (n_test, d)
        seed : int

        Returns
        -------
        ndarray, shape (n_test,)
        """


def random(
    train: Dataset, test: Dataset, train_embeddings: Embeddings, test_embeddings: Embeddings, seed: int
) -> Floats:
    """One run of a router that knows nothing; :func:`training.metrics.evaluate_random` averages several."""
    scores: Floats = random_router_scores(len(test), runs=1, seed=seed)[0]
    return scores


def prompt_length(
    train: Dataset, test: Dataset, train_embeddings: Embeddings, test_embeddings: Embeddings, seed: int
) -> Floats:
    """Characters of the ask: the floor that any learned router must clear."""
    return np.array([prompt.characters for prompt in test.prompts], dtype=np.float64)


def oracle(
    train: Dataset, test: Dataset, train_embeddings: Embeddings, test_embeddings: Embeddings, seed: int
) -> Floats:
    """The gain itself, which no router knows beforehand: the ceiling."""
    weak, strong = _pair(test)
    return oracle_scores(weak, strong)


def tfidf_logistic(
    train: Dataset, test: Dataset, train_embeddings: Embeddings, test_embeddings: Embeddings, seed: int
) -> Floats:
    """TF-IDF over words and pairs of words, one logistic head a target; the score is p(strong) − p(weak)."""
    # The library's own pattern drops words of one character: half of arithmetic, and most of Chinese.
    vectorizer = TfidfVectorizer(
        ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b", sublinear_tf=True, dtype=np.float32
    )
    seen = vectorizer.fit_transform(prompt.text for prompt in train.prompts)
    asked = vectorizer.transform(prompt.text for prompt in test.prompts)
    weak, strong = (_expected_quality(seen, quality, asked, seed) for quality in _pair(train))
    return strong - weak


def minilm_knn(
    train: Dataset, test: Dataset, train_embeddings: Embeddings, test_embeddings: Embeddings, seed: int
) -> Floats:
    """Mean gain of the ``NEIGHBOURS`` training prompts nearest by cosine, or of all where there are fewer."""
    weak, strong = _pair(train)
    gain = strong - weak
    scores = np.empty(len(test))
    for rows, nearest in nearest_rows(train_embeddings, test_embeddings):
        scores[rows] = gain[nearest].mean(axis=1)
    return scores


def nearest_rows(seen: Embeddings, asked: Embeddings) -> Iterator[tuple[slice, NDArray[np.intp]]]:
    """The ``NEIGHBOURS`` nearest of n rows by cosine, or all where there are fewer: for m rows, some at a time."""
    known, queries = unit_rows(seen), unit_rows(asked)
    neighbours = min(NEIGHBOURS, len(known))
    for start in range(0, len(queries), _CHUNK):
        rows = slice(start, start + _CHUNK)
        yield rows, np.argpartition(queries[rows] @ known.T, -neighbours, axis=1)[:, -neighbours:]


def average(
    train: Dataset, test: Dataset, train_embeddings: Embeddings, test_embeddings: Embeddings, seed: int
) -> Floats:
    """The mean of ``tfidf_logistic`` and ``minilm_knn``, each standardised over the test rows."""
    return standardised_mean(
        tfidf_logistic(train, test, train_embeddings, test_embeddings, seed),
        minilm_knn(train, test, train_embeddings, test_embeddings, seed),
    )


def clusters(
    train: Dataset, test: Dataset, train_embeddings: Embeddings, test_embeddings: Embeddings, seed: int
) -> Floats:
    """Avengers-Pro's router (arXiv 2508.12631): k-means over embeddings, and each cluster's mean quality by model.

    A prompt gets the mean over its ``NEAREST_CLUSTERS`` nearest of ``CLUSTERS`` clusters, weighted by
    exp(−``SHARPNESS`` · distance); the score is the gain. The paper's weight between quality and cost is what a threshold
    on that score stands for.
    """
    weak, strong = _pair(train)
    seen, asked = unit_rows(train_embeddings), unit_rows(test_embeddings)
    wanted = max(1, min(CLUSTERS, len(train) // ROWS_A_CLUSTER, len({row.tobytes() for row in seen})))
    with threadpool_limits(limits=1):
        found = KMeans(wanted, n_init=1, random_state=seed).fit(seen)
        distance = found.transform(asked)
    # Of a cluster that k-means left empty nothing is known: the mean of all stands for it.
    size = np.bincount(found.labels_, minlength=wanted)
    gained = np.bincount(found.labels_, strong - weak, minlength=wanted)
    gain = np.where(size > 0, gained / np.maximum(size, 1), (strong - weak).mean())
    nearest = np.argsort(distance, axis=1, kind="stable")[:, :NEAREST_CLUSTERS]
    near = np.exp(-SHARPNESS * np.take_along_axis(distance, nearest, axis=1).astype(np.float64))
    scores: Floats = (near * gain[nearest]).sum(axis=1) / near.sum(axis=1)
    return scores


def matrix_factorisation(
    train: Dataset, test: Dataset, train_embeddings: Embeddings, test_embeddings: Embeddings, seed: int
) -> Floats:
    """RouteLLM's matrix factorisation (arXiv 2406.18665, §4.2), trained on the qualities of the rows given.

    A bilinear score of model and prompt, s(M, q) = v_M · (W q + b) + c_M, whose logistic is the expected quality; the
    paper's last layer is part of v_M. RouteLLM fits it to preferences of the Arena; qualities are what is known here.
    """
    weak, strong = _pair(train)
    quality = np.stack([weak, strong], axis=1)
    seen, asked = _with_one(unit_rows(train_embeddings)), _with_one(unit_rows(test_embeddings))
    inputs, models = seen.shape[1], quality.shape[1]
    start = np.random.default_rng(seed).normal(0.0, 0.1, (inputs + models, FACTORS))
    share = np.clip(quality.mean(axis=0), 1e-3, 1.0 - 1e-3)
    offset = np.log(share / (1.0 - share))

    def loss(flat: Floats) -> tuple[float, Floats]:
        both = flat[:-models].reshape(inputs + models, FACTORS)
        projection, model, level = both[:inputs], both[inputs:], flat[-models:]
        hidden = seen @ projection.astype(np.float32)
        logit = hidden @ model.T + level
        error = expit(logit) - quality
        entropy = float(np.logaddexp(0.0, logit).sum() - (quality * logit).sum())
        gradient = np.concatenate(
            [
                (seen.T @ (error @ model).astype(np.float32)) + FACTOR_PENALTY * projection,
                error.T @ hidden + FACTOR_PENALTY * model,
            ]
        )
        value = entropy + 0.5 * FACTOR_PENALTY * float((both**2).sum())
        return value, np.concatenate([gradient.ravel(), error.sum(axis=0)])

    with threadpool_limits(limits=1):
        fitted = minimize(
            loss,
            np.concatenate([start.ravel(), offset]),
            jac=True,
            method="L-BFGS-B",
            options={"maxiter": 100},
        ).x
        both = fitted[:-models].reshape(inputs + models, FACTORS)
        expected = expit(asked @ both[:inputs] @ both[inputs:].T + fitted[-models:])
    scores: Floats = expected[:, 1] - expected[:, 0]
    return scores


BASELINES: Mapping[str, Baseline] = MappingProxyType(
    {
        "random": random,
        "prompt_length": prompt_length,
        "oracle": oracle,
        "tfidf_logistic": tfidf_logistic,
        "minilm_knn": minilm_knn,
        "average": average,
        "clusters": clusters,
        "matrix_factorisation": matrix_factorisation,
    }
)


def standardised_mean(*scores: Floats) -> Floats:
    """Mean of z-scores, shape (n,); scores that are all equal count as zeros."""
    standardised = [(score - score.mean()) / (score.std() or 1.0) for score in scores]
    mean: Floats = np.mean(standardised, axis=0)
    return mean


def _pair(rows: Dataset) -> tuple[Floats, Floats]:
    """Qualities of weak and strong, shape (n,) each."""
    if len(rows.targets) != 2:
        raise ValueError(f"baselines take a pair of targets, got {len(rows.targets)}")
    if np.isnan(rows.quality).any():
        raise ValueError("baselines take rows that are labelled for both targets")
    return rows.quality[:, 0], rows.quality[:, 1]


def _expected_quality(seen: Any, quality: Floats, asked: Any, seed: int) -> Floats:
    """Probability of success from a logistic head, shape (n_test,).

    A quality between 0 and 1 is a success with that weight and a failure with the rest: logistic regression
    then minimises the cross-entropy to the fraction.
    """
    success, failure = np.flatnonzero(quality > 0.0), np.flatnonzero(quality < 1.0)
    if not len(success) or not len(failure):
        return np.full(asked.shape[0], quality.mean())
    head = LogisticRegression(solver="liblinear", random_state=seed)
    # liblinear calls BLAS for short vectors: on a busy machine a second thread makes it ten times slower.
    with threadpool_limits(limits=1, user_api="blas"):
        head.fit(
            vstack([seen[success], seen[failure]]),
            np.repeat([1, 0], [len(success), len(failure)]),
            sample_weight=np.concatenate([quality[success], 1.0 - quality[failure]]),
        )
    probability: Floats = head.predict_proba(asked)[:, 1].astype(np.float64)
    return probability


def _with_one(rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """A last column of ones, for the intercept."""
    return np.hstack([rows, np.ones((len(rows), 1), dtype=np.float32)])
