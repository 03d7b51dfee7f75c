"""The policies in force: configured ones, overlaid by those set over HTTP, with their history.

Reads come from one immutable table that is replaced as a whole, so a request sees either the old
policies or the new ones. A write appends a version to the policy's stored history and takes effect
then; other replicas follow through the document store.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, Final, TypeVar

from cache.documents import Documents
from cache.errors import CacheError
from gateway.errors import Conflict, InvalidRequest, Unavailable
from gateway.policy.audience import Audience, Nobody
from gateway.policy.canary import Plan, Split
from gateway.policy.force import check_chain, check_without, in_force
from gateway.policy.matching import RequestFacts, Table
from gateway.policy.parse import parse_policy, written
from gateway.policy.policy import DEFAULT, Policy
from gateway.policy.rollout import Rollouts
from gateway.policy.versions import (
    CONFIGURED,
    LOCAL,
    By,
    History,
    Kind,
    Version,
    lost,
    read_history,
)

log = logging.getLogger(__name__)

NAMESPACE: Final = "policies"
MAX_STORED: Final = 256
T = TypeVar("T")


class PolicyStore:
    """Policies by name. Owned by the event loop.

    Args:
        configured: from the configuration; `default` is added when it is not among them.
        documents: where histories of policies set over HTTP live.
        clock: Unix seconds.
        audience: told of every version made here and every outcome of a candidate.
    """

    def __init__(
        self,
        configured: Iterable[Policy],
        documents: Documents,
        *,
        clock: Callable[[], float] = time.time,
        audience: Audience | None = None,
    ) -> None:
        self._configured = {policy.name: policy for policy in (DEFAULT, *configured)}
        self._documents = documents
        self._clock = clock
        self._audience = audience or Nobody()
        self._writing = asyncio.Lock()
        self._histories: dict[str, History] = {}
        self._stored: dict[str, Policy] = {}
        self._watching = False
        self._keeping: set[asyncio.Task[None]] = set()
        self._table = Table({})
        self.rollouts = Rollouts(documents, self._fallback, self._audience.canary_outcome)
        self._swap()

    async def load(self) -> None:
        """Read what is stored and follow every later change, made here or by another replica."""
        await self._documents.watch(NAMESPACE, self._changed)
        self._watching = True
        for name, document in (await self._documents.all(NAMESPACE)).items():
            self._take(name, document)
        self._swap()
        await self.rollouts.load()

    async def close(self) -> None:
        """Store what is not stored yet."""
        await asyncio.gather(*self._keeping)
        await self.rollouts.close()

    # -- reading ----------------------------------------------------------------------------------

    @property
    def table(self) -> Table:
        """All policies as they are now, with everything they inherit."""
        return self._table

    def match(self, facts: RequestFacts, named: str | None = None) -> Policy:
        """The policy of a request; see `Table.match`."""
        return self._table.match(facts, named)

    def get(self, name: str) -> Policy:
        """The policy with everything it inherits; see `Table.get`."""
        return self._table.get(name)

    def list(self) -> list[Policy]:
        """Every policy, the first to match first; `default` last."""
        return self._table.ordered()

    def written(self) -> dict[str, Policy]:
        """Every policy by name as it was written, before anything is inherited."""
        return {**self._configured, **self._stored}

    def history(self, name: str) -> History:
        """Every version that is remembered, oldest first; what the configuration holds is version
        0. Deleted policies keep theirs.

        Raises:
            NotFound.
        """
        stored = self._histories.get(name, History())
        if name not in self._configured:
            if not stored.versions:
                self.get(name)
            return stored
        base = Version(
            version=CONFIGURED,
            author="configuration",
            kind="configured",
            document=written(self._configured[name]),
        )
        return History(versions=(base, *stored.versions))

    def split(self, name: str) -> Split | None:
        """Both arms of a policy while a candidate for it is tried."""
        return self._table.splits.get(name)

    def version_of(self, policy: Policy) -> int | None:
        """Number of the version that a policy from `match` is; None: it is no longer in force."""
        name = policy.name
        split, history = self._table.splits.get(name), self._histories.get(name, History())
        if split is not None and split.canary is policy:
            return history.last
        if self._table.policies.get(name) is not policy:
            return None
        version = history.in_force
        if version is None or version.document is None:
            return CONFIGURED
        return version.version

    def observe(self, policy: Policy, *, met: bool) -> None:
        """A request that `match` gave this policy has ended: did it keep all its bounds?"""
        self.rollouts.observe(policy, met=met)

    # -- writing ----------------------------------------------------------------------------------

    async def put(self, policy: Policy, by: By = LOCAL) -> Version:
        """Create or replace a policy, here and on every replica. A configured one is overridden;
        a candidate that is being tried is dropped.

        Raises:
            InvalidRequest: `extends` is no policy, or leads back. Conflict: too many policies.
            Unavailable: it cannot be stored; nothing has changed.
        """
        async with self._writing:
            await self._make_room(policy.name)
            check_chain(policy, self.written())
            document = written(policy)
            return await self._append(
                policy.name, lambda old: old.then("put", document, by, self._clock())
            )

    async def delete(self, name: str, by: By = LOCAL) -> Version:
        """Delete a stored policy; a configured one that it overrode is in force again. The history
        stays.

        Raises:
            NotFound: there is none of that name. Conflict: it comes from the configuration, or
                others extend it. Unavailable: the deletion cannot be stored; nothing has changed.
        """
        async with self._writing:
            self.get(name)
            if name not in self._stored:
                raise Conflict(
                    f"policy {name!r} comes from the configuration and cannot be deleted; "
                    "it can be overridden"
                )
            check_without(name, self._configured, self._stored)
            return await self._append(name, lambda old: old.then("delete", None, by, self._clock()))

    async def rollback(self, name: str, number: int, by: By = LOCAL) -> Version:
        """Put an earlier version in force again, as a new version.

        Raises:
            NotFound: no such policy or version. Conflict: the version cannot be restored.
            InvalidRequest: what it extends is gone. Unavailable: it cannot be stored.
        """
        async with self._writing:
            document = self.history(name).get(number).document
            if number == CONFIGURED:
                document = None  # the configuration's own is in force where nothing is stored
            if document is None:
                check_without(name, self._configured, self._stored)
            else:
                await self._make_room(name)
                check_chain(parse_policy(name, document), self.written())
            return await self._append(
                name, lambda old: old.then("rollback", document, by, self._clock(), of=number)
            )

    async def start_canary(self, candidate: Policy, plan: Plan, by: By = LOCAL) -> Version:
        """Try a candidate for the policy of its name on a share of that policy's requests. The same
        candidate again, with a larger share, keeps those who have it.

        Raises:
            NotFound: there is no such policy yet. InvalidRequest: the candidate matches other
                requests than the policy does, or extends what it cannot. Unavailable.
        """
        async with self._writing:
            stable = self.get(candidate.name)
            if candidate.match != stable.match:
                raise InvalidRequest(
                    f"match: must be as in {candidate.name!r} itself: whom a policy applies to "
                    "cannot be tried on a share of those it applies to",
                    param="policy.match",
                )
            check_chain(candidate, self.written())
            document = written(candidate)

            def begin(old: History) -> History:
                trial = old.trial
                same = trial is not None and trial.document == document
                first = (trial.of or trial.version) if same and trial is not None else None
                return old.then("canary", document, by, self._clock(), of=first, plan=plan)

            return await self._append(candidate.name, begin)

    async def promote(self, name: str, by: By = LOCAL) -> Version:
        """Put the candidate in force for everybody.

        Raises:
            NotFound. Conflict: none is being tried. Unavailable.
        """
        self.get(name)
        async with self._writing:

            def promoted(old: History) -> History:
                trial = old.trying()
                return old.then("promote", trial.document, by, self._clock(), of=trial.version)

            return await self._append(name, promoted)

    async def abort(self, name: str, by: By = LOCAL) -> Version:
        """Stop trying the candidate; the policy in force serves everybody.

        Raises:
            NotFound. Conflict: none is being tried. Unavailable.
        """
        self.get(name)
        async with self._writing:
            return await self._append(name, lambda old: self._end(old, "abort", by))

    async def _fallback(self, name: str, number: int, why: str) -> None:
        """The candidate of version `number` attains too little."""
        by = By(author="pressgate", comment=why)

        def ended(old: History) -> History:
            if old.trial is None or old.trial.version != number:
                raise Conflict("another replica was first")
            return self._end(old, "fallback", by)

        async with self._writing:
            try:
                await self._append(name, ended)
            except Conflict:
                return
        log.warning("policy %s: candidate of version %d is dropped: %s", name, number, why)

    def _end(self, old: History, kind: Kind, by: By) -> History:
        return old.then(kind, old.document, by, self._clock(), of=old.trying().version)

    async def _append(self, name: str, change: Callable[[History], History]) -> Version:
        """Store one version more of a policy, after whatever is stored by then, and follow it.

        Raises:
            Unavailable: it cannot be stored; nothing has changed.
        """

        version = (await self._update(name, change)).versions[-1]
        self._audience.policy_changed(name, version.kind)
        return version

    async def _update(self, name: str, change: Callable[[History], History]) -> History:
        def changed(document: dict[str, Any] | None) -> dict[str, Any]:
            return change(_history_of(name, document)).stored()

        document = await self._persist(self._documents.update(NAMESPACE, name, changed))
        if not self._watching:
            self._changed(name, document)
        return _history_of(name, document)

    async def _persist(self, write: Awaitable[T]) -> T:
        try:
            return await write
        except (CacheError, OSError) as error:
            raise Unavailable(f"the policy cannot be stored: {error}", retry_after=30) from error

    # -- checks -----------------------------------------------------------------------------------

    async def _make_room(self, name: str) -> None:
        """Where there are too many histories, forget one whose policy is gone.

        Raises:
            Conflict: none is gone.
        """
        if name in self._histories or len(self._histories) < MAX_STORED:
            return
        gone = [
            (history.versions[-1].at, other)
            for other, history in self._histories.items()
            if other not in self._table.policies
        ]
        if not gone:
            raise Conflict(f"there are {MAX_STORED} stored policies already; delete some")
        _, oldest = min(gone)
        await self._persist(self._documents.delete(NAMESPACE, oldest))
        self._histories.pop(oldest, None)

    # -- following --------------------------------------------------------------------------------

    def _changed(self, name: str, document: dict[str, Any] | None) -> None:
        """The store says that `name` is now `document` (None: deleted).

        Two replicas that were cut off from each other may both have made versions; one history wins
        then, and what it lacks is added to it for the record.
        """
        mine = self._histories.get(name)
        self._take(name, document)
        self._swap()
        theirs = self._histories.get(name, History())
        if mine is not None and document is not None and lost(mine, theirs):
            task = asyncio.create_task(self._keep(name, mine))
            self._keeping.add(task)
            task.add_done_callback(self._keeping.discard)

    async def _keep(self, name: str, mine: History) -> None:
        try:
            async with self._writing:
                await self._update(name, lambda theirs: theirs.keeping(lost(mine, theirs)))
        except Unavailable as error:
            log.error("versions of policy %s are lost: %s", name, error.message)

    def _take(self, name: str, document: dict[str, Any] | None) -> None:
        try:
            history = read_history(document) if document is not None else History()
            current = history.document
            policy = None if current is None else parse_policy(name, current)
        except (ValueError, InvalidRequest) as error:
            log.warning("stored policy %s is left out: %s", name, error)
            return
        self._histories.pop(name, None)
        self._stored.pop(name, None)
        if history.versions:
            self._histories[name] = history
        if policy is not None:
            self._stored[name] = policy

    def _swap(self) -> None:
        before = self._table.splits
        force = in_force(self.written(), self._histories, self._table)
        for fault in force.faults:
            log.warning("%s", fault)
        self._table = force.table
        splits = force.table.splits
        for name in before.keys() - splits.keys():
            self._audience.canary_percent(name, 0.0)
        for name, split in splits.items():
            self._audience.canary_percent(name, split.plan.percent)
        self.rollouts.follow({name: (split, force.trials[name]) for name, split in splits.items()})


def _history_of(name: str, document: dict[str, Any] | None) -> History:
    """What is stored; what cannot be read is written anew."""
    try:
        return read_history(document) if document is not None else History()
    except ValueError as error:
        log.warning("the history of policy %s cannot be read: %s", name, error)
        return History()
