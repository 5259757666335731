"""What torch's profiler counted, as an oracle for memory."""

from __future__ import annotations

import itertools

import torch


def peak_allocated(profile: torch.profiler.profile) -> int:
    """The highest sum of bytes that the allocator gave out since the profile began; it needs `profile_memory`."""
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    # The name of an event's time changed with torch 2.2 or so; events of the same moment stay in order.
    ordered = sorted(events, key=lambda event: event.start_ns() if hasattr(event, "start_ns") else event.start_us())
    return max(itertools.accumulate(event.nbytes() for event in ordered), default=0)
