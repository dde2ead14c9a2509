"""The answers of a gang's ranks to one call: values, an error, or the loss of a rank."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psutil

from hvp_workers.backend import BackendError, GroupLostError
from hvp_workers.ray_rank import Outcome, Place


@dataclass(frozen=True, kw_only=True)
class Member:
    """One rank as its driver sees it."""

    actor: Any  # Ray's handle of a `Rank`
    place: Place
    memory_bytes: int = 0  # its share of its host's, or its device's, once it has joined


async def collect(
    members: Sequence[Member],
    references: Sequence[Any],
    *,
    what: str,
    limit_s: float,
    straggler_s: float,
) -> list[Any]:
    """Await the outcome of one call on every rank.

    Args:
        members: The ranks, in order.
        references: Ray's references to one `Outcome` of each.
        what: The call, for messages.
        limit_s: Time for all answers.
        straggler_s: Time for the other ranks once one has raised: they may wait for it for ever.

    Returns:
        The values, in order of rank.

    Raises:
        BackendError: The error that every rank raised.
        GroupLostError: A rank died, did not answer in time, or failed alone.
    """
    import ray

    futures = [asyncio.wrap_future(reference.future()) for reference in references]
    for future in futures:
        # A rank that is given up answers late and badly; that is no news then.
        future.add_done_callback(lambda late: late.cancelled() or late.exception())
    outcomes: dict[int, Outcome] = {}
    pending = set(futures)
    started = time.monotonic()
    deadline = started + limit_s
    while pending:
        done, pending = await asyncio.wait(
            pending,
            timeout=max(0.0, deadline - time.monotonic()),
            return_when=asyncio.FIRST_COMPLETED,
        )
        if not done:
            silent = [rank for rank, future in enumerate(futures) if future in pending]
            waited = f"{time.monotonic() - started:.0f} s"
            failed = {rank: got.error for rank, got in outcomes.items() if got.error is not None}
            if not failed:
                raise _lost(members, silent, f"no answer to {what} within {waited}")
            cause = f"{_listed(failed)} in {what} while others waited for it ({waited})"
            raise _lost(members, list(failed), cause, _traces(failed))
        for future in done:
            rank = futures.index(future)
            try:
                outcomes[rank] = future.result()
            except ray.exceptions.RayTaskError as error:  # an answer that cannot be sent
                cause = f"{type(error.cause).__name__}: {error.cause}"
                failure = BackendError("INTERNAL", cause, trace=str(error))
                outcomes[rank] = Outcome(error=failure)
            except ray.exceptions.RayError as error:
                cause = f"its process ended during {what} ({_exit_of(error)})"
                raise _lost(members, [rank], cause) from error
            if outcomes[rank].error is not None:
                deadline = min(deadline, time.monotonic() + straggler_s)
    return _agree(members, [outcomes[rank] for rank in range(len(futures))], what)


def _agree(members: Sequence[Member], outcomes: Sequence[Outcome], what: str) -> list[Any]:
    """The values, if every rank has one.

    Raises:
        BackendError: The error that every rank raised.
        GroupLostError: Some ranks raised and others did not, or they raised different errors.
    """
    errors = {rank: got.error for rank, got in enumerate(outcomes) if got.error is not None}
    if not errors:
        return [outcome.value for outcome in outcomes]
    kinds = {(error.reason, error.metadata.get("exception")) for error in errors.values()}
    if len(errors) == len(outcomes) and len(kinds) == 1:
        raise errors[0]
    # Where some went on or failed elsewhere, their next collectives would not pair up.
    cause = f"{_listed(errors)} in {what}, and the ranks did not all do so"
    raise _lost(members, list(errors), cause, _traces(errors))


def _listed(errors: Mapping[int, BackendError]) -> str:
    return "; ".join(f"rank {rank} raised {_brief(error)}" for rank, error in errors.items())


def _brief(error: BackendError) -> str:
    """A refusal in full; of an unforeseen error only its kind, for its text is in the trace."""
    kind = error.metadata.get("exception", "") if error.trace else ""
    return f"{error.reason} ({kind})" if kind else str(error)


def _traces(errors: Mapping[int, BackendError]) -> str:
    """Tracebacks of the ranks' unforeseen errors, for the server's log."""
    return "\n".join(
        f"rank {rank}:\n{error.trace}" for rank, error in errors.items() if error.trace
    )


def _lost(
    members: Sequence[Member], ranks: Sequence[int], cause: str, trace: str = ""
) -> GroupLostError:
    processes = ", ".join(
        f"rank {rank} (process {place.process.pid} on {place.hostname}{_state(place)})"
        for rank in ranks
        for place in (members[rank].place,)
    )
    first = members[ranks[0]].place
    return GroupLostError(
        "WORKER_GROUP_LOST",
        f"Lost {processes}: {cause}. The whole group has been ended and starts anew.",
        {"rank": str(ranks[0]), "pid": str(first.process.pid), "hostname": first.hostname},
        trace,
    )


def _state(place: Place) -> str:
    """The kernel's status of a process of this machine, in words; "" if it has none."""
    process = place.process.find()
    try:
        return f", {process.status()}" if process is not None else ""
    except psutil.NoSuchProcess:
        return ""


def _exit_of(error: Exception) -> str:
    """The part of Ray's explanation that is about this process, on one line."""
    text = " ".join(str(error).split())
    _, found, detail = text.partition("Worker exit type: ")
    return (detail if found else text).partition(" Some common causes")[0][:400]
