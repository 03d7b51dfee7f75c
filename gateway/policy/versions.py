"""The history of one policy: immutable numbered versions, and what they say is in force. Pure.

The history is the policy's whole state, so that one atomic write changes everything: the document
of the last version that is no `canary` is in force (None: there is none), and a candidate is being
tried exactly while the last version is a `canary`. Versions made apart count for neither.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final, Literal

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gateway.errors import Conflict, NotFound
from gateway.policy.canary import Plan

MAX_VERSIONS: Final = 50
MAX_COMMENT: Final = 500  # characters
MAX_BYTES: Final = 800_000  # of one history; older versions than fit are forgotten
CONFIGURED: Final = 0  # number of the version that the configuration holds

Document = dict[str, Any]
Kind = Literal[
    "configured", "put", "delete", "rollback", "canary", "promote", "abort", "fallback", "apart"
]  # fmt: skip
_ASIDE: Final = ("canary", "apart")  # kinds that put nothing in force


class By(BaseModel):
    """Who changes a policy and why. `author` is the name of an API key, or `local`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    author: str = "local"
    comment: str | None = Field(default=None, max_length=MAX_COMMENT)


LOCAL: Final = By()


class Version(BaseModel):
    """One change of a policy.

    Attributes:
        at: when, UTC, as `2026-11-23T01:15:00Z`; empty when nobody wrote it down.
        kind: `put` and `delete` as asked; `rollback` to an earlier version; `canary` began or
            widened a trial, which `promote` and `abort` end by hand and `fallback` by itself;
            `apart` was made by a replica that was cut off, under the number `of`, and is kept for
            the record.
        of: the version this one refers to.
        document: the policy as it was written, without its name; None: there is none from here on.
        plan: how the candidate is tried; for `canary`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = Field(ge=0)
    at: str = ""
    author: str = "unknown"
    comment: str | None = None
    kind: Kind = "put"
    of: int | None = None
    document: Document | None = None
    plan: Plan | None = None

    @model_validator(mode="after")
    def _complete(self) -> Version:
        if self.kind == "canary" and (self.plan is None or self.document is None):
            raise ValueError("a candidate has a document and a plan")
        return self

    def row(self) -> dict[str, Any]:
        """Without the document, for lists."""
        return self.model_dump(mode="json", exclude={"document"})


class History(BaseModel):
    """The versions of one policy, oldest first. Numbers only grow and are never used again."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: tuple[Version, ...] = ()

    @property
    def in_force(self) -> Version | None:
        """The version whose document is in force; None before the first."""
        settled = (version for version in reversed(self.versions) if version.kind not in _ASIDE)
        return next(settled, None)

    @property
    def document(self) -> Document | None:
        """The policy in force as it was written."""
        version = self.in_force
        return version.document if version is not None else None

    @property
    def trial(self) -> Version | None:
        """The candidate that is being tried."""
        told = (version for version in reversed(self.versions) if version.kind != "apart")
        last = next(told, None)
        return last if last is not None and last.kind == "canary" else None

    @property
    def last(self) -> int:
        return self.versions[-1].version if self.versions else CONFIGURED

    def get(self, number: int) -> Version:
        """
        Raises:
            NotFound: the message lists the numbers there are.
        """
        for version in self.versions:
            if version.version == number:
                return version
        known = ", ".join(str(version.version) for version in self.versions) or "none"
        raise NotFound(f"version {number}: there is no such version; there are: {known}",
                       param="version")  # fmt: skip

    def trying(self) -> Version:
        """
        Raises:
            Conflict: no candidate is being tried.
        """
        if self.trial is None:
            raise Conflict("no candidate is being tried; begin with :canary", code="no_canary")
        return self.trial

    def then(
        self,
        kind: Kind,
        document: Document | None,
        by: By,
        now: float,
        *,
        of: int | None = None,
        plan: Plan | None = None,
    ) -> History:
        """This history with one version more; the oldest are forgotten where there are too many,
        but never what is in force."""
        version = Version(
            version=self.last + 1,
            at=utc(now),
            author=by.author,
            comment=by.comment,
            kind=kind,
            of=of,
            document=document,
            plan=plan,
        )
        return History(versions=_bounded((*self.versions, version)))

    def keeping(self, apart: Iterable[Version]) -> History:
        """This history with versions of a replica that was cut off, as of who made them and when,
        under new numbers."""
        versions = self.versions
        for version in apart:
            number = versions[-1].version + 1 if versions else 1
            kept = {"version": number, "kind": "apart", "of": version.version, "plan": None}
            versions = (*versions, version.model_copy(update=kept))
        return History(versions=_bounded(versions))

    def stored(self) -> Document:
        """As it is kept: complete, so that other defaults in a later release change no history."""
        return self.model_dump(mode="json")


def read_history(document: Mapping[str, Any]) -> History:
    """A history as it is stored; a bare policy, as older releases wrote it, is its first version.

    Raises:
        ValueError: neither.
    """
    if "versions" not in document:
        bare = {name: value for name, value in document.items() if name != "name"}
        return History(versions=(Version(version=1, document=bare),))
    try:
        return History.model_validate(document)
    except ValidationError as error:
        raise ValueError(str(error)) from None


def lost(mine: History, theirs: History) -> list[Version]:
    """Versions of `mine` that `theirs`, which has won over it, says nothing of."""
    by_number = {version.version: version for version in theirs.versions}
    kept = {(v.of, v.at, v.author) for v in theirs.versions if v.kind == "apart"}
    first = theirs.versions[0].version if theirs.versions else 0
    return [
        version
        for version in mine.versions
        if version.version >= first
        and version.kind != "apart"
        and by_number.get(version.version) != version
        and (version.version in by_number or version.version > theirs.last)
        and (version.version, version.at, version.author) not in kept
    ]


def utc(now: float) -> str:
    """Unix seconds as the UTC time that versions carry."""
    return datetime.fromtimestamp(now, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def changes(old: Document | None, new: Document | None) -> list[dict[str, Any]]:
    """What differs, field by field in order of name: `field` (`match.header.x-tier`), `from` and
    `to`; a field that is not written in one of them lacks that side."""
    before, after = _flat(old or {}), _flat(new or {})
    rows = []
    for name in sorted(before.keys() | after.keys()):
        if name in before and name in after and before[name] == after[name]:
            continue
        row = {"field": name}
        row |= {"from": before[name]} if name in before else {}
        row |= {"to": after[name]} if name in after else {}
        rows.append(row)
    return rows


def _flat(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in document.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _bounded(versions: tuple[Version, ...]) -> tuple[Version, ...]:
    """The newest versions that fit, and the one in force wherever it stands."""
    in_force = History(versions=versions).in_force
    keep: list[Version] = []
    size = len(_bytes(in_force)) if in_force is not None else 0
    for version in reversed(versions):
        size += len(_bytes(version)) if version is not in_force else 0
        full = len(keep) >= MAX_VERSIONS or size > MAX_BYTES
        if full and keep and version is not in_force:
            continue
        keep.append(version)
    return tuple(reversed(keep))


def _bytes(version: Version) -> bytes:
    return orjson.dumps(version.model_dump(mode="json"))
