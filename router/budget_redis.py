"""Budgets that are counted in Redis. Its script is one step that nothing comes between."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from router.budget_store import KEPT, LEASE, Missing, Share, Totals, Turn, Wanted
from router.budgets import SECOND, Count
from router.errors import BudgetError

# In braces, so that a cluster keeps all of them in one place, where a script can reach them together.
PREFIX = "{router-budgets}:"
_SECONDS = 2.0

# A count is a hash: spent, requests, threshold, and of each process its share, as "spent requests reserved expires".
# It does what router.budget_store.granted does. Its numbers are doubles: exact up to nine million dollars.
_TURN = """
local shares, wanted = cjson.decode(ARGV[1]), cjson.decode(ARGV[2])
local clock = redis.call('TIME')
local now = clock[1] * 1000000 + clock[2]
local missing = {}
for i, share in ipairs(shares) do
  if redis.call('HEXISTS', KEYS[i], 'spent') == 0 then missing[#missing + 1] = i - 1 end
end
if #missing > 0 then return cjson.encode({missing = missing}) end
local whole = function(number) return string.format('%.0f', number) end
local totals = {}
for i, share in ipairs(shares) do
  local total = {reserved = share.reserved, others = 0}
  local before = {share.known_spent, share.known_requests}
  local all = redis.call('HGETALL', KEYS[i])
  for f = 1, #all, 2 do
    local name, value = all[f], all[f + 1]
    if name == 'spent' or name == 'requests' or name == 'threshold' then
      total[name] = tonumber(value)
    else
      local spent, requests, reserved, expires = string.match(value, '(%S+) (%S+) (%S+) (%S+)')
      if name == 'h:' .. share.holder then
        before = {tonumber(spent), tonumber(requests)}
      elseif tonumber(expires) > now then
        total.others = total.others + tonumber(reserved)
      else
        redis.call('HDEL', KEYS[i], name)
      end
    end
  end
  total.spent = total.spent + share.spent - before[1]
  total.requests = total.requests + share.requests - before[2]
  if share.tells then total.threshold = type(share.threshold) == 'number' and share.threshold or nil end
  totals[i] = total
end
local refused = {}
for w, one in ipairs(wanted) do
  local full = {}
  for l, limit in ipairs(one.limits) do
    local total = totals[limit[1] + 1]
    if total.spent + total.others + total.reserved + one.amount > limit[2] then full[#full + 1] = limit[1] end
  end
  if one.force then full = {} end
  refused[w] = full
  if #full == 0 then
    for l, limit in ipairs(one.limits) do
      local total = totals[limit[1] + 1]
      total.reserved = total.reserved + one.amount
    end
  end
end
local found = {}
for i, share in ipairs(shares) do
  local total = totals[i]
  redis.call('HSET', KEYS[i], 'spent', whole(total.spent), 'requests', whole(total.requests), 'h:' .. share.holder,
    whole(share.spent) .. ' ' .. whole(share.requests) .. ' ' .. whole(total.reserved) .. ' ' .. whole(now + ARGV[3]))
  if total.threshold then
    redis.call('HSET', KEYS[i], 'threshold', string.format('%.17g', total.threshold))
  else
    redis.call('HDEL', KEYS[i], 'threshold')
  end
  found[i] = {whole(total.spent), whole(total.reserved + total.others), whole(total.requests),
    total.threshold and string.format('%.17g', total.threshold) or ''}
end
return cjson.encode({totals = found, refused = refused})
"""

_BEGIN = """
for i, key in ipairs(KEYS) do
  for f, name in ipairs({'spent', 'requests'}) do
    local base = ARGV[3 * i - 3 + f]
    local held = redis.call('HGET', key, name)
    if not held or tonumber(held) < tonumber(base) then redis.call('HSET', key, name, base) end
  end
  redis.call('PEXPIREAT', key, ARGV[3 * i])
end
"""


class RedisStore:
    """Counts in Redis, as hashes that go by themselves some weeks after their period.

    Parameters
    ----------
    url : str
        ``redis://…``, ``rediss://…`` or ``unix://…``.
    lease : int
        Microseconds.
    """

    def __init__(self, url: str, lease: int = LEASE) -> None:
        try:
            from redis import Redis
        except ImportError:
            raise BudgetError(
                "Redis' client is not installed: pip install 'llm-difficulty-router[redis]'"
            ) from None
        try:
            self._client: Any = Redis.from_url(
                url, socket_timeout=_SECONDS, socket_connect_timeout=_SECONDS, decode_responses=True
            )
        except ValueError:
            raise BudgetError(
                "the budget store's URL cannot be read; give redis://USER:PASSWORD@HOST:PORT/NUMBER"
            ) from None
        self._prefix = PREFIX
        self._lease = lease
        self._turn = self._client.register_script(_TURN)
        self._begin = self._client.register_script(_BEGIN)
        self.shown = re.sub(r"//[^@/]*@", "//***@", url).partition("?")[0]

    def open(self) -> None:
        with self._asked():
            self._client.ping()

    def begin(self, bases: Mapping[Count, Totals]) -> None:
        arguments: list[Any] = []
        for count, base in bases.items():
            arguments += [base.spent, base.requests, (count.end + KEPT) // 1000]
        with self._asked():
            self._begin(keys=[self._key(count) for count in bases], args=arguments)

    def turn(self, shares: Sequence[Share], wanted: Sequence[Wanted]) -> Turn:
        counts = [share.count for share in shares]
        place = {count: index for index, count in enumerate(counts)}
        names = [one.name for one in fields(Share) if one.name != "count"]
        with self._asked():
            answer = self._turn(
                keys=[self._key(count) for count in counts],
                args=[
                    json.dumps([{name: getattr(share, name) for name in names} for share in shares]),
                    json.dumps(
                        [
                            {
                                "limits": [(place[limit.count], limit.amount) for limit in one.limits],
                                "amount": one.amount,
                                "force": one.force,
                            }
                            for one in wanted
                        ]
                    ),
                    self._lease,
                ],
            )
        found = json.loads(answer)
        if "missing" in found:
            raise Missing(counts[index] for index in found["missing"])
        return Turn(
            {count: _totals(*values) for count, values in zip(counts, found["totals"], strict=True)},
            # Lua's empty table is an object.
            tuple(tuple(counts[index] for index in full) for full in found["refused"] or ()),
        )

    def read(self, time: int) -> dict[Count, Totals]:
        found = {}
        with self._asked():
            seconds, rest = self._client.time()
            clock = seconds * SECOND + rest
            for key in self._client.scan_iter(match=self._prefix.replace("[", "\\[") + "*", count=1000):
                count = Count.of(key.removeprefix(self._prefix))
                if count.end <= time:
                    continue
                values = self._client.hgetall(key)
                holds = [value.split() for name, value in values.items() if name.startswith("h:")]
                reserved = sum(int(hold[2]) for hold in holds if int(hold[3]) > clock)
                found[count] = _totals(
                    values.get("spent", 0), reserved, values.get("requests", 0), values.get("threshold", "")
                )
        return dict(sorted(found.items(), key=lambda item: item[0].id))

    def close(self) -> None:
        self._client.close()

    def _key(self, count: Count) -> str:
        return self._prefix + count.id

    @contextmanager
    def _asked(self) -> Iterator[None]:
        from redis.exceptions import RedisError

        try:
            yield
        except (RedisError, OSError) as error:
            words = " ".join(str(error).split()) or type(error).__name__
            raise BudgetError(f"the budget store at {self.shown} cannot be used: {words[:300]}") from None


def _totals(spent: Any, reserved: Any, requests: Any, threshold: str) -> Totals:
    return Totals(int(spent), int(reserved), int(requests), float(threshold) if threshold else None)
