"""The devices and streams that graphs are captured and replayed on."""

from __future__ import annotations

import contextlib
from collections import ChainMap, UserDict

import pytest
import torch

from detr_fast import capture
from detr_fast.engine.graphs import GraphedFunction, mapped
from tests import stub_cuda


def test_a_graph_is_captured_on_its_own_device_whichever_is_current(emulated, monkeypatch):
    """On another device's stream nothing of it would be captured, and replays would do nothing."""
    current, streams = [torch.device("cuda", 0)], []

    @contextlib.contextmanager
    def device(chosen):
        current.append(chosen)
        yield
        current.pop()

    @contextlib.contextmanager
    def graph(made, pool, stream, capture_error_mode):
        streams.append(stream)
        yield

    class Stream(stub_cuda.Stream):
        def __init__(self, *_):
            self.device = current[-1]

    monkeypatch.setattr(capture, "_streams", {})
    cuda = {"device": device, "current_device": lambda: current[-1].index, "graph": graph, "Stream": Stream}
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for index in (1, 0, 1):
        ran = []
        graphed = GraphedFunction(lambda ran=ran: ran.append(current[-1].index), torch.device("cuda", index))
        for _ in range(3):
            graphed()
        assert ran == [index] * 3
        assert graphed.graphs == 1
    assert [one.device.index for one in streams] == [1, 0, 1]
    assert streams[0] is streams[2]  # as graphs of one memory pool want it


def test_a_replay_waits_for_one_on_another_stream(emulated, monkeypatch):
    """It writes what the other one may still read."""
    waits = []

    class Stream(stub_cuda.Stream):
        def wait_stream(self, stream):
            waits.append((self, stream))

    first, second = Stream(), Stream()
    graphed = GraphedFunction(lambda x: x + 1, torch.device("cpu"), warmup=1)
    graphed(torch.ones(2))
    for stream, expected in ((first, []), (first, []), (second, [(second, first)]), (second, [])):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None, stream=stream: stream)
        waits.clear()
        assert graphed(torch.ones(2)).tolist() == [2.0, 2.0]
        assert waits == expected
    assert graphed.graphs == 1


def test_what_follows_on_a_call_that_failed_waits_for_what_it_had_begun(emulated, monkeypatch):
    waits = []

    class Stream(stub_cuda.Stream):
        def wait_stream(self, stream):
            waits.append((self, stream))

    def full(x):
        raise torch.OutOfMemoryError("out of memory")

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_: side)
    side = Stream()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current)
    with pytest.raises(torch.OutOfMemoryError):
        GraphedFunction(full, torch.device("cpu"))(torch.ones(2))
    assert waits == [(side, current), (current, side)]


def test_calls_that_failed_warm_up_for_no_capture(emulated):
    """An optimizer would make its state in the graph, which then makes it anew at each replay."""
    full = True

    def function(x):
        if full:
            raise torch.OutOfMemoryError("out of memory")
        return x + 1

    graphed = GraphedFunction(function, torch.device("cpu"))
    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            graphed(torch.ones(2))
    full = False
    for graphs_then in (0, 0, 1, 1):
        assert graphed(torch.ones(2)).tolist() == [2.0, 2.0]
        assert graphed.graphs == graphs_then


def test_tensors_are_found_in_mappings_of_any_class(emulated):
    """Labels of transformers' image processors are a list of such."""
    graphed = GraphedFunction(lambda labels: labels[0]["boxes"] + 1, torch.device("cpu"), warmup=1)
    for value in (1.0, 2.0, 3.0):
        assert graphed([UserDict(boxes=torch.full((2,), value))]).tolist() == [value + 1, value + 1]
    assert graphed.graphs == 1


def test_mappings_keep_their_class():
    """Batches of transformers are read by attributes, too, also where nothing is captured."""

    class Batch(UserDict):
        def __getattr__(self, name: str):
            return self.data[name]

    graphed = GraphedFunction(lambda batch: batch.labels + 1, torch.device("cpu"), reason="no GPU")
    given = Batch(labels=torch.ones(2))
    assert graphed(given).tolist() == [2.0, 2.0]
    assert given.labels.tolist() == [1.0, 1.0]


def test_tensors_moved_out_of_a_mapping_do_not_change_it():
    class Shelf(ChainMap):  # copies of which share its entries
        __copy__ = None

        def __reduce__(self):
            return Shelf, tuple(self.maps)

    given = Shelf({"labels": torch.ones(2)})
    assert mapped(given, torch.neg)["labels"].tolist() == [-1.0, -1.0]
    assert given["labels"].tolist() == [1.0, 1.0]
