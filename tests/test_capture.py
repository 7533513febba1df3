"""Capture and replay of lowered graphs, with a stand-in for the CUDA graph."""

import pytest
import torch

from think_compile.runtime import capture
from think_compile.runtime.capture import ATTEMPTS, LARGE, MAX_CAPTURES, NotCaptured, Replayed, Signature


class Lowered:
    def __init__(self):
        self.runs = 0

    def __call__(self, values):
        self.runs += 1
        return [values[0] + values[1]]


class StandIn:
    """A capture that computes on replay."""

    made = 0
    fails = False

    def __init__(self, lowered, values, signature):
        if StandIn.fails:
            raise NotCaptured("made up")
        StandIn.made += 1
        self.signature = signature

    def replay(self, values):
        return [values[0] + values[1]]


@pytest.fixture
def replayed(monkeypatch):
    StandIn.made, StandIn.fails = 0, False
    monkeypatch.setattr(capture, "Capture", StandIn)
    monkeypatch.setattr(capture, "obstacle", lambda values: "")
    lowered = Lowered()
    return Replayed(lowered, lowered, [0])


def test_captured_in_the_second_call_and_replayed_from_then_on(replayed):
    weight = torch.randn(4)
    for i in range(5):
        assert torch.equal(replayed([weight, torch.full((4,), float(i))])[0], weight + i)
    assert replayed.lowered.runs == 1 and StandIn.made == 1


def test_another_place_is_another_capture(replayed):
    weights = [torch.randn(4) for _ in range(2)]
    for weight in (*weights, *weights, *weights):  # interleaved: no signature is seen twice in a row
        replayed([weight, torch.ones(4)])
    assert StandIn.made == 0 and replayed.lowered.runs == 6
    for weight in weights:
        for _ in range(2):
            replayed([weight, torch.ones(4)])
    assert StandIn.made == 2
    runs = replayed.lowered.runs
    for weight in (*weights, *weights):
        replayed([weight, torch.ones(4)])
    assert replayed.lowered.runs == runs


def test_the_oldest_capture_is_let_go(replayed):
    weights = [torch.randn(4) for _ in range(MAX_CAPTURES + 2)]
    for weight in weights:
        for _ in range(2):
            replayed([weight, torch.ones(4)])
    assert len(replayed.captures) == MAX_CAPTURES and StandIn.made == len(weights)


def test_what_cannot_be_captured_runs_as_it_is(replayed, caplog):
    StandIn.fails = True
    weight = torch.randn(4)
    for _ in range(3 * ATTEMPTS):
        assert torch.equal(replayed([weight, torch.ones(4)])[0], weight + 1)
    assert replayed.lowered.runs == 3 * ATTEMPTS and replayed.refused == "made up"
    assert len([record for record in caplog.records if "made up" in record.message]) == 1


def test_a_capture_that_failed_once_is_tried_again(replayed):
    StandIn.fails = True
    weight = torch.randn(4)
    for _ in range(2):
        replayed([weight, torch.ones(4)])
    StandIn.fails = False
    for _ in range(3):
        assert torch.equal(replayed([weight, torch.ones(4)])[0], weight + 1)
    assert StandIn.made == 1 and replayed.lowered.runs == 3 and not replayed.refused


def test_a_signature_is_places_shapes_and_numbers():
    place, other = torch.randn(4), torch.ones(2, 3)
    signature = Signature([place, other, 5], frozenset([0]))
    assert signature.matches([place, torch.zeros(2, 3), 5])
    assert not signature.matches([place.clone(), other, 5])
    assert not signature.matches([place, torch.ones(3, 2), 5])
    assert not signature.matches([place, torch.ones(3, 2).T, 5])
    assert not signature.matches([place, other, 6])


def test_a_large_input_counts_by_its_place():
    large = torch.empty(LARGE, dtype=torch.uint8)
    signature = Signature([large], frozenset())
    assert signature.placed == [0] and not signature.matches([large.clone()])
    assert not signature.matches([large.view(2, -1)])


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ([torch.ones(2)], "inputs are on cpu"),
        ([torch.ones(2), torch.ones(2, device="meta")], "inputs are on cpu, meta"),
    ],
)
def test_obstacles(values, why):
    assert capture.obstacle(values) == why
