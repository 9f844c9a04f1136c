from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import pytest

from router.errors import UsageError
from router.metrics import Metrics
from router.sessions import Cache, Session, SessionRule
from router.shared_sessions import Place, SharedSessions, decoded, encoded, session_place

SESSION = Session(
    "large", 1000.0, "code", 9_000, 12_000, 800, 4, 1, 0.3, 5.0, 1,
    (Cache("small", 9_000, 940.0), Cache("large", 12_000, 1000.0)),
)  # fmt: skip


@pytest.fixture(params=["redis", "postgresql"])
def url(request: pytest.FixtureRequest) -> str:
    """An address of each kind."""
    if request.param == "postgresql":
        return str(request.getfixturevalue("postgres"))
    return str(request.getfixturevalue("redis_url"))


@pytest.fixture
def key() -> str:
    return secrets.token_hex(16)


class Fragile:
    """A place in memory that can be away in three ways: it refuses, it never answers, or it talks nonsense."""

    shown = "redis://somewhere:1/0"

    def __init__(self) -> None:
        self.kept: dict[str, tuple[str, float]] = {}
        self.wrong: str = ""
        self.turns = 0

    def turn(self, reads: Sequence[str], writes: Mapping[str, str]) -> Mapping[str, tuple[str, float]]:
        self.turns += 1
        if self.wrong == "refuses":
            raise ConnectionRefusedError("nobody there")
        while self.wrong == "silent":
            time.sleep(0.01)
        if self.wrong == "nonsense":
            return dict.fromkeys(reads, ('{"age": []}', 0.0))
        self.kept |= {key: (state, time.monotonic()) for key, state in writes.items()}
        found = {key: self.kept[key] for key in reads if key in self.kept}
        return {key: (state, time.monotonic() - at) for key, (state, at) in found.items()}

    def close(self) -> None:
        pass


def shared(place: Place, **times: float) -> SharedSessions:
    return SharedSessions(place, Metrics(), **times)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def later(seconds: float = 0.0) -> float:
    return time.monotonic() + seconds


def same(one: Session | None, other: Session, *, within: float = 0.5) -> bool:
    """All but the times, which may differ by a round trip."""
    if one is None or json.loads(encoded(one, 0)).keys() != json.loads(encoded(other, 0)).keys():
        return False
    close = [abs(one.at - other.at) < within]
    close += [
        abs(a.at - b.at) < within and (a.target, a.tokens) == (b.target, b.tokens)
        for a, b in zip(one.caches, other.caches, strict=True)
    ]
    names = ("incumbent", "mode", "first_context", "context", "output", "requests", "switches")
    names += ("hard_share", "weight", "asides")
    return all(close) and all(getattr(one, name) == getattr(other, name) for name in names)


class TestEncoding:
    def test_keeps_all_but_the_clock(self) -> None:
        assert decoded(encoded(SESSION, 1010.0), 5010.0) == Session(
            "large", 5000.0, "code", 9_000, 12_000, 800, 4, 1, 0.3, 5.0, 1,
            (Cache("small", 9_000, 4940.0), Cache("large", 12_000, 5000.0)),
        )  # fmt: skip

    def test_another_version_may_write_more_or_less(self) -> None:
        found = json.loads(encoded(SESSION, 1000.0))
        del found["asides"]
        assert decoded(json.dumps(found | {"mood": 3}), 1000.0) == Session(
            "large", 1000.0, "code", 9_000, 12_000, 800, 4, 1, 0.3, 5.0, 0, SESSION.caches
        )

    @pytest.mark.parametrize("state", ["", "[]", "{}", '{"age": "x", "caches": []}', '{"caches": [1]}', "\0"])
    def test_what_is_no_session_is_none(self, state: str) -> None:
        assert decoded(state, 0.0) is None

    def test_is_small_and_holds_no_text(self) -> None:
        state = encoded(SESSION, 1000.0)
        assert len(state) < 300
        assert {word for word in json.loads(state).values() if isinstance(word, str)} == {"large", "code"}


class TestPlaces:
    def test_a_session_goes_from_server_to_server(self, url: str, key: str) -> None:
        async def test() -> None:
            here, there = shared(session_place(url)), shared(session_place(url))
            now = later()
            session = Session(
                "large",
                now,
                "plan",
                10,
                20,
                30,
                1,
                caches=(Cache("small", 5, now - 60), Cache("large", 20, now)),
            )
            await there.fetch(key, now)
            assert there.get(key, now) is None
            here.put(key, session)
            await here.share(key, now)
            await asyncio.sleep(0.1)
            await there.fetch(key, later())
            assert same(there.get(key, later()), session)
            # A cache of a minute ago is still there, and not for longer than it would be here.
            found = there.get(key, later())
            assert found is not None
            assert found.cached("small", later(), SessionRule()) == 5
            assert found.cached("small", later(241), SessionRule()) == 0
            here.close()
            there.close()

        run(test)

    def test_the_last_to_be_written_counts(self, url: str, key: str) -> None:
        async def test() -> None:
            here, there = shared(session_place(url)), shared(session_place(url))
            for store, target in ((here, "small"), (there, "large"), (here, "medium")):
                store.put(key, Session(target, later(), requests=1))
                await store.share(key, later())
            await there.fetch(key, later())
            found = there.get(key, later())
            assert found is not None
            assert found.incumbent == "medium"
            here.close()
            there.close()

        run(test)

    def test_many_at_once(self, url: str, key: str) -> None:
        async def test() -> None:
            here, there = shared(session_place(url)), shared(session_place(url))
            keys = [f"{key}{number}" for number in range(100)]
            for number, one in enumerate(keys):
                here.put(one, Session(f"target-{number}", later()))
            await asyncio.gather(*(here.share(one, later()) for one in keys))
            await asyncio.gather(*(there.fetch(one, later()) for one in keys))
            found = [there.get(one, later()) for one in keys]
            assert [one and one.incumbent for one in found] == [f"target-{number}" for number in range(100)]
            assert not here.away
            assert not there.away
            here.close()
            there.close()

        run(test)

    def test_a_wrong_address_is_found_out_and_says_no_password(
        self, caplog: pytest.LogCaptureFixture, key: str
    ) -> None:
        async def test(url: str) -> None:
            store = shared(session_place(url))
            store.put(key, SESSION)
            await store.fetch(key, 1000.0)
            assert store.away
            store.close()

        for scheme in ("redis", "postgresql"):
            with caplog.at_level(logging.ERROR):
                asyncio.run(test(f"{scheme}://me:hidden@127.0.0.1:9/0"))
            assert f"{scheme}://127.0.0.1:9/0 cannot be used" in caplog.text
        assert "hidden" not in caplog.text

    def test_postgresql_forgets(self, postgres: str, key: str) -> None:
        """A session that nobody used for an hour is gone, and its row goes with those of others."""
        import psycopg

        async def test() -> None:
            store = shared(session_place(postgres))
            for number in range(1, 501):
                store.put(f"{key}{number}", Session("small", later()))
                await store.share(f"{key}{number}", later())
                if number == 300:
                    with psycopg.connect(postgres, autocommit=True) as connection:
                        connection.execute("UPDATE router_sessions SET written = written - interval '3601 s'")
                    other = shared(session_place(postgres))
                    await other.fetch(f"{key}1", later())
                    assert other.get(f"{key}1", later()) is None
                    other.close()
            with psycopg.connect(postgres) as connection:
                assert connection.execute("SELECT count(*) FROM router_sessions").fetchone() == (200,)
            store.close()

        run(test)

    def test_redis_forgets(self, redis_url: str, key: str) -> None:
        from redis import Redis

        async def test() -> None:
            store = shared(session_place(redis_url))
            store.put(key, Session("small", later()))
            await store.share(key, later())
            store.close()

        run(test)
        with Redis.from_url(redis_url) as client:
            assert 3_590 < client.ttl(f"router:session:1:{key}") <= 3_600

    @pytest.mark.parametrize("url", ["memory", "mysql://a:secret@b/c", "redis:secret", "http://secret", ""])
    def test_what_is_no_place_is_said_without_repeating_it(self, url: str) -> None:
        with pytest.raises(UsageError, match="give redis://HOST/0 or postgresql://") as caught:
            session_place(url)
        assert "secret" not in str(caught.value)


class TestAway:
    @pytest.mark.parametrize("how", ["refuses", "silent"])
    def test_the_server_goes_on_with_its_own_and_nobody_waits(
        self, how: str, key: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def test() -> None:
            place = Fragile()
            store = shared(place, timeout=0.3, pause=0.2)
            store.put(key, Session("large", later()))
            place.wrong = how
            await store.fetch(key, later())
            assert store.away
            started = time.monotonic()
            for _ in range(100):
                await store.fetch(key, later())
                store.put(key, Session("medium", later()))
                await store.share(key, later())
            assert time.monotonic() - started < 0.25  # less than once the time to wait
            found = store.get(key, later())
            assert found is not None
            assert found.incumbent == "medium"
            place.wrong = ""
            await until(lambda: not store.away)
            await store.share(key, later())
            assert key in place.kept
            store.close()

        with caplog.at_level(logging.INFO):
            run(test)
        lines = [record.getMessage() for record in caplog.records if "sessions:" in record.getMessage()]
        assert len(lines) == 2
        assert "redis://somewhere:1/0 cannot be used" in lines[0]
        assert "answers again" in lines[1]

    def test_what_was_decided_meanwhile_is_not_undone(self, key: str) -> None:
        """The store still has the session as it was before it went away."""

        async def test() -> None:
            place = Fragile()
            store = shared(place, timeout=0.05, pause=0.05)
            store.put(key, Session("small", later(-30)))
            await store.share(key, later())
            place.wrong = "refuses"
            store.put(key, Session("large", later()))
            await store.share(key, later())
            place.wrong = ""
            await until(lambda: not store.away)
            await store.fetch(key, later())
            found = store.get(key, later())
            assert found is not None
            assert found.incumbent == "large"
            store.close()

        run(test)

    def test_a_busy_event_loop_is_not_a_store_that_is_away(self, key: str) -> None:
        async def test() -> None:
            store = shared(Fragile(), timeout=0.05)
            await store.look()
            waiting = asyncio.create_task(store.fetch(key, later()))
            await asyncio.sleep(0)
            time.sleep(0.2)  # of which the store needed next to nothing
            await waiting
            assert not store.away
            store.close()

        run(test)

    def test_what_comes_together_goes_together(self, key: str) -> None:
        async def test() -> None:
            place = Fragile()
            store = shared(place)
            await store.look()
            await asyncio.gather(*(store.fetch(f"{key}{number}", later()) for number in range(300)))
            assert place.turns < 30
            store.close()

        run(test)

    def test_nonsense_is_passed_over(self, key: str) -> None:
        async def test() -> None:
            place = Fragile()
            place.wrong = "nonsense"
            store = shared(place)
            store.put(key, SESSION)
            await store.fetch(key, 1000.0)
            assert store.get(key, 1000.0) == SESSION
            assert not store.away
            store.close()

        run(test)

    def test_the_metrics_say_so(self, key: str) -> None:
        async def test() -> None:
            place, metrics = Fragile(), Metrics()
            store = SharedSessions(place, metrics, timeout=0.05, pause=60)
            await store.fetch(key, later())
            place.wrong = "refuses"
            await store.fetch(key, later())
            await store.fetch(key, later())
            page = metrics.text().decode()
            for outcome in ("ok", "failed", "passed"):
                assert f'router_session_store_total{{outcome="{outcome}",what="read"}} 1.0' in page
            assert "router_session_store_away 1.0" in page
            store.close()

        run(test)


async def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)
