"""A ledger as some weeks of a team of coding agents would leave it, for looking at."""

from __future__ import annotations

import itertools
from random import Random

from router.entry import Entry, NanoPrices
from router.ledger_migrations import migrate
from router.ledger_store import ledger_url, open_engine, write_batch
from router.policy import Prices
from router.traffic import FAMILIES, generate
from router.upstream import Usage

DAY = 86_400_000_000
PRICES = {
    "small": NanoPrices.of(Prices(input=0.25, output=2, cached_read=0.025)),
    "medium": NanoPrices.of(Prices(input=1.25, output=10, cached_read=0.125)),
    "frontier": NanoPrices.of(Prices(input=5, output=25, cached_read=0.5, cache_write=6.25)),
}
MODELS = {"small": "openai/small-1", "medium": "openai/medium-1", "frontier": "anthropic/frontier-1"}
CLIENTS = ("web-team", "mobile-team", "ci", "data-team", "support-bot")
_AT = {"plan": "frontier", "architect": "frontier", "ask": "medium"}
_WHEN = (1, 3, 5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16, 17, 20)  # o'clock


def sessions(until: int, days: int, each_day: int, bundle: str, threshold: float) -> list[Entry]:
    """The requests of so many days before a time (microseconds since 1970), oldest first."""
    random = Random("dashboard")
    families = list(FAMILIES)
    made: list[Entry] = []
    midnight = until // DAY * DAY
    for day, number in itertools.product(range(days), range(each_day)):
        weekend = (midnight // DAY - day + 3) % 7 > 4  # 1970 began on a Thursday
        if weekend and number % 3:
            continue
        start = midnight - day * DAY + int((random.choice(_WHEN) + random.random()) * DAY / 24)
        client = random.choices(CLIENTS, (8, 5, 3, 2, 1))[0]
        session = f"{random.getrandbits(128):032x}"
        warm: dict[int, str] = {}
        for step in generate(random.choice(families), random.randrange(10_000)).steps:
            time = start + int(step.seconds * 1e6)
            before = warm.get(step.thread)
            score: float | None = None
            if step.mode in _AT:
                reason, target = "signal", _AT[step.mode]
            elif step.mode == "internal":
                reason, target = "signal", "small"
            else:
                score = step.gain * 0.8 - 0.05
                over = score > threshold
                reason, target = "predicted", "frontier" if over else "small"
                if before == "frontier" and not over and random.random() < 0.3:
                    reason, target = "sticky", before
                elif random.random() < 0.02:
                    reason, target = random.choice(
                        (("fallback", "medium"), ("capability", "frontier"), ("unknown", "frontier"))
                    )
            cached = step.context - step.new if before == target else 0
            warm[step.thread] = target
            usage = Usage(step.context, step.output, cached, step.new if target == "frontier" else 0)
            failed = random.random() < 0.006
            used = Usage(0, 0) if failed else usage
            if time < until:
                made.append(
                    Entry(
                        id=f"{time:014x}{random.getrandbits(72):018x}",
                        time=time,
                        request=f"req_{random.getrandbits(128):032x}",
                        session=session,
                        client=client,
                        tier="balanced" if client != "ci" else "auto",
                        mode=step.mode if random.random() < 0.96 else None,
                        feature=step.feature or ("agent" if client != "support-bot" else "support"),
                        dialect="messages" if client == "mobile-team" else "chat",
                        reason=reason,
                        score=score,
                        threshold=None if score is None else threshold,
                        bundle=bundle,
                        policy="0123456789ab",
                        target=target,
                        model=MODELS[target],
                        provider=MODELS[target].partition("/")[0],
                        input_tokens=used.input,
                        cached_read_tokens=used.cached,
                        cache_write_tokens=used.cache_write,
                        output_tokens=used.output,
                        prices=PRICES[target],
                        cost=PRICES[target].cost(used),
                        strongest="frontier",
                        strongest_cost=PRICES["frontier"].cost(used),
                        latency_us=int(random.lognormvariate(0.6, 0.6) * 1e6),
                        first_token_us=int(random.lognormvariate(-0.9, 0.4) * 1e6),
                        decision_us=int(random.lognormvariate(0.9, 0.3) * 1e3),
                        status=502 if failed else 200,
                        error="upstream_error" if failed else None,
                        streamed=True,
                        fallbacks=int(reason == "fallback"),
                    )
                )
    made.sort(key=lambda one: (one.time, one.id))
    return made


def fill(where: str, entries: list[Entry]) -> None:
    """Write rows into a ledger, which is made where there is none."""
    engine = open_engine(ledger_url(where), "create")
    try:
        migrate(engine)
        for start in range(0, len(entries), 2_000):
            with engine.begin() as connection:
                write_batch(connection, [one.row() for one in entries[start : start + 2_000]])
    finally:
        engine.dispose()
