"""The tables of docs/accuracy.md agree with the results."""

import json

import pytest

from evals import document

HEAD = {"model": "m", "samples": 3, "task": "t", "dtype": "torch.float32", "device": "d", "versions": {"torch": "2"}}


def results(folder, **rows):
    for name, some in rows.items():
        (folder / f"{name}.json").write_text(json.dumps(HEAD | {"rows": some}))
    return folder


def a_row(ratio, kl, **what):
    return {
        "ratio": ratio,
        "kl": [kl, kl / 2, kl * 2],
        "agreement": [0.9, 0.8, 1],
        "method": "simulated",
        "recent": 64,
        **what,
    }


def test_what_is_written_by_hand_stays(tmp_path):
    folder = results(tmp_path, recent=[a_row(0.5, 0.02, recent=8), a_row(0.7, 0.04, recent=8)])
    text = "before\n<!-- recent -->\nold\n<!-- end recent -->\nafter\n<!-- a note -->\n"
    filled = document.filled(text, folder)
    assert filled.startswith("before\n<!-- recent -->\n") and filled.endswith(
        "<!-- end recent -->\nafter\n<!-- a note -->\n"
    )
    assert "old" not in filled
    assert "|  | ratio 0.5 | ratio 0.7 |" in filled
    assert "| `recent=8` | 0.0200 [0.0100, 0.0400] | 0.0400 [0.0200, 0.0800] |" in filled
    assert "m, 3 samples of `t`, float32, d; torch 2." in filled
    assert document.filled(filled, folder) == filled


def test_ratios_by_method(tmp_path):
    rows = [a_row(0.1, 0.01), a_row(0.2, 0.02), a_row(0.1, 0.03, recent=32), a_row(0.2, 2, method="random")]
    table = document.ratio(HEAD | {"rows": rows})
    assert "| KL, nats a token | 0.1 | 0.2 |" in table
    assert "| think_compile | 0.0100 | 0.0200 |" in table
    assert "| the same with the paper's window, recent=32 | 0.0300 |  |" in table
    assert "| random channels |  | 2.0000 |" in table
    assert "| think_compile | 90.0 | 90.0 |" in table


def test_plans_with_their_bits():
    plan = {"group": 64, "sinks": 4, "channel_multiple": 1, "keys": "8:0.5+4:0.5"}
    rows = [a_row(0.0, 0.01, **plan), a_row(0.0, 0.02, values="4", **plan)]
    table = document.plans(HEAD | {"rows": rows})
    # 6 bits, and 32 for the range of a channel in a group; 4 bits, and 32 for that of a token's block
    assert "| 8:0.5+4:0.5 | 16 | 6.5, 16 | 0.01000 [0.00500, 0.02000] | 90.0 |" in table
    assert "| 8:0.5+4:0.5 | 4 | 6.5, 4.5 | 0.02000" in table


def test_an_option_of_plans():
    plan = {"group": 128, "keys": "8:0.5+4:0.5"}
    rows = [
        a_row(0.0, 0.01, **plan),
        a_row(0.0, 0.02, **plan | {"group": 32}),
        a_row(0.0, 0.03, **plan | {"keys": "4"}),
    ]
    table = document.option_of_plans("group")(HEAD | {"rows": rows})
    assert "|  | keys 8:0.5+4:0.5 | keys 4 |" in table
    assert "| `group=32` | 0.02000 [0.01000, 0.04000] |  |" in table


def test_needles_of_plans():
    dense = {"task": "needle", "n": 4, "metrics": {"acc,none": 1.0}, "method": "dense", "less_dense": {}}
    ours = {"metrics": {"acc,none": 0.75}, "method": "think", "less_dense": {"acc,none": [-0.25, -0.5, 0.0]}}
    table = document.needles(HEAD | {"rows": [dense, dense | ours | {"keys": "4", "values": "8"}]})
    assert "|  | `needle`, n = 4 |" in table and "| dense | 1.000 |" in table
    assert "| keys 4, values 8 | 0.750 (-0.250 [-0.500, +0.000]) |" in table


def test_tasks_with_their_differences():
    row = {"task": "needle", "n": 4, "metrics": {"acc,none": 0.75}, "method": "dense", "less_dense": {}}
    ours = row | {
        "method": "think",
        "ratio": 0.5,
        "effective_ratio": 0.25,
        "less_dense": {"acc,none": [-0.25, -0.5, 0.0]},
    }
    table = document.tasks(HEAD | {"rows": [row, ours, row | {"task": "other", "metrics": {"f1,none": 0.5}}]})
    assert "| task | metric | n | dense | think 0.5 (25% dropped) |" in table
    assert "| `needle` | acc | 4 | 0.7500 | -0.2500 [-0.500, +0.000] |" in table
    assert "| `other` | f1 | 4 | 0.5000 |  |" in table


def test_an_unknown_table_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no such table: 'ratios'"):
        document.filled("<!-- ratios -->\n<!-- end ratios -->", tmp_path)
