"""Events of a GPU without one: what is recorded on which stream, and when somebody waits."""

import torch


def note_events(monkeypatch, stream):
    """What is said from here on, in order: "wait", or `stream` of the device that an event is recorded on."""
    said = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            said.append(stream)

        def elapsed_time(self, end):
            return 4.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    return said
