"""The budgets of one request: what they change of its decision, what is held for it, and what it is told where they end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from router.accounting import billed, sample_of, worst_case
from router.budgets import SECOND, Budgets, Limit, iso
from router.content import Content, KnownContent
from router.decision import Decision, RequestFacts
from router.entry import Entry, now
from router.errors import BudgetError, RequestError
from router.failover import Attempt
from router.metrics import Metrics
from router.policy import Policy
from router.purse import Full, Hold, Purse

logger = logging.getLogger("router")

# Seconds after which a request may come back that found all that is left held by others, or the store away.
_SOON = 5


class Account:
    """One request's.

    Parameters
    ----------
    purse : Purse
    policy : Policy
        That it is decided by, and which has budgets.
    client, feature : str or None
    arrived : int
        Microseconds since 1970; this says in which periods it counts.
    metrics : Metrics
    """

    def __init__(
        self,
        purse: Purse,
        policy: Policy,
        client: str | None,
        feature: str | None,
        arrived: int,
        metrics: Metrics,
    ) -> None:
        assert policy.budgets is not None
        self._purse = purse
        self._policy = policy
        self._budgets: Budgets = policy.budgets
        self._metrics = metrics
        self._hold = Hold(self._budgets.limits(client, feature, arrived))

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What limits this request."""
        return self._hold.limits

    def known_to(self, facts: RequestFacts) -> RequestFacts:
        """The facts, with what the budgets say before anything is decided."""
        facts = replace(facts, pace=self._purse.pace(self.limits))
        full = self._purse.full(self.limits) if self._budgets.at_limit == "cheapest" else None
        return facts if full is None else self.at_limit(facts, full)

    def at_limit(self, facts: RequestFacts, full: Full) -> RequestFacts:
        """The facts of a request that there is no room for; :class:`RequestError`, 402, where it is refused.

        Whoever is refused learns whose budget it is and when it begins anew, and no amounts.
        """
        whose = full.count.words
        if self._budgets.at_limit == "cheapest":
            return replace(facts, at_limit=f"{whose} has no room for more")
        self._metrics.budget("refused")
        resets = f"it begins anew at {iso(full.count.end)}"
        told = f"{whose} has no room for this request"
        seconds = -(-(full.count.end - now()) // SECOND)
        if not full.spent:
            told, seconds = f"{told} beside those that are under way", _SOON
        raise RequestError(
            f"{told[0].upper()}{told[1:]}; {resets}.",
            status=402,
            code="budget_exceeded",
            headers={"retry-after": str(max(seconds, 1))},
        )

    async def hold(self, target: str, content: Content | KnownContent, *, force: bool = False) -> Full | None:
        """Hold what the request may cost at a target; what has no room for it, where nothing is held."""
        return await self._more(self._most(target, content), force=force)

    async def hold_again(
        self, target: str, content: Content | KnownContent, earlier: Sequence[Attempt]
    ) -> None:
        """Hold what a further call may cost, beside what the earlier ones were billed; :class:`RequestError`, 402."""
        most = self._most(target, content) + billed(earlier, content, self._policy)
        more = most - self._hold.amount
        if more <= 0:
            return
        full = await self._more(more)
        if full is not None:
            raise RequestError(
                f"{full.count.words} has no room for {target}.", status=402, code="budget_exceeded"
            )

    def settle(self, entry: Entry | None, decision: Decision | None = None) -> None:
        """The request is over; an entry says what it cost."""
        if entry is None or decision is None:
            self._purse.settle(self._hold, 0)
        else:
            sample = sample_of(entry, decision.options, self._policy)
            self._purse.settle(self._hold, entry.cost or 0, sample)

    def tell(self, decision: Decision, request: str) -> None:
        """Count what a budget did to a decision, and say so where it was about a quality that the policy asks for."""
        if decision.budget is not None:
            self._metrics.budget(decision.budget)
        if decision.budget in ("crossed", "held"):
            logger.warning("id=%s budget: a quality of the policy is %s", request, decision.budget)

    def _most(self, target: str, content: Content | KnownContent) -> int:
        """What to hold for a call: beyond the largest limit more changes nothing, and clients ask for more than stores count."""
        enough = max((limit.amount for limit in self.limits), default=0) + 1
        return min(worst_case(self._policy.targets[target], content), enough)

    async def _more(self, amount: int, *, force: bool = False) -> Full | None:
        try:
            return await self._purse.hold(
                self._hold, amount, force=force, alone=self._budgets.on_outage == "allow"
            )
        except BudgetError as error:
            self._metrics.budget("outage")
            logger.warning("%s", error)
            raise RequestError(
                "The budgets cannot be counted at present.",
                status=503,
                code="budgets_unavailable",
                headers={"retry-after": str(_SOON)},
            ) from None
