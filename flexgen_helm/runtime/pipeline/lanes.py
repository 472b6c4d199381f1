"""Lanes: schedulers with their tickets. One process has one lane; a pipeline has several, with a sweep of each in flight."""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field

from flexgen_helm.runtime.intake import Ticket
from flexgen_helm.schedule.rows import Sweep
from flexgen_helm.schedule.work import PromptWork, Scheduler


@dataclass(eq=False)
class Lane:
    """A scheduler and its tickets."""

    scheduler: Scheduler
    waiting: list[Ticket] = field(default_factory=list)
    """Tickets for its next sweep."""
    joining: list[Ticket] = field(default_factory=list)
    """Tickets on their way from `waiting` to `tickets`."""
    tickets: dict[PromptWork, list[Ticket]] = field(default_factory=lambda: defaultdict(list))
    apart: deque[list[Ticket]] = field(default_factory=deque)
    """Tickets of a sweep that failed, computed group by group, so that only the tickets that cause the error fail."""
    shared: list[PromptWork] = field(default_factory=list)
    """Work for several tickets, some of which may be answered before the others."""
    sweep: Sweep | None = None
    """Sweep that is in flight: computed here, and not answered."""

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.sweep or self.waiting or self.apart or self.scheduler.has_work())

    def take_waiting(self) -> list[Ticket]:
        """Move the tickets that come next to `joining`: those that wait, or a group that is computed apart."""
        if not self.apart:
            self.joining, self.waiting = self.waiting, []
        elif not self.tickets:
            self.joining = self.apart.popleft()
        return self.joining

    def abandon(self) -> list[Ticket]:
        """Drop all work after a failure; returns the tickets whose work it was."""
        self.scheduler.abandon()
        tickets = self.joining + [ticket for waiting in self.tickets.values() for ticket in waiting]
        self.tickets.clear()
        self.joining, self.shared, self.sweep = [], [], None
        return tickets

    def give_up(self) -> list[Ticket]:
        """Return the tickets that were not begun, which it then has no more."""
        tickets = [ticket for group in self.apart for ticket in group] + self.waiting
        self.apart.clear()
        self.waiting = []
        return tickets


def distribute(tickets: list[Ticket], lanes: list[Lane]) -> None:
    """Divide tickets between lanes: prompts that begin alike stay together, and each lane gets about as many tokens.

    Equal prompts get into one lane, so that they are computed once. The lane with the least work gets the first part.
    """
    if len(lanes) == 1:
        lanes[0].waiting += tickets
        return
    ordered = sorted(tickets, key=lambda ticket: ticket.prepared.input_ids)
    sizes = [len(ticket.prepared.input_ids) + ticket.prepared.job.max_new_tokens for ticket in ordered]
    by_load = sorted(lanes, key=lambda lane: sum(lane.scheduler.tokens_left()) + len(lane.waiting))
    total, done, part = sum(sizes), 0, 0
    for i, (ticket, size) in enumerate(zip(ordered, sizes, strict=True)):
        is_new = i == 0 or ticket.prepared.input_ids != ordered[i - 1].prepared.input_ids
        if is_new:
            part = min(len(lanes) - 1, max(part, done * len(lanes) // total))
        by_load[part].waiting.append(ticket)
        done += size
