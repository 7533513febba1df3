"""The studies: their rows, no second measurement of known rows, and plots of everything."""

import pytest
import torch
import typer
from random_lm import random_model, word_tokenizer, words
from typer.testing import CliRunner

from evals import peers, plots, studies
from think_compile.evals.divergence import Divergence, Sample
from think_compile.evals.settings import Settings
from think_compile.evals.statistics import mean_interval


def some_samples(count=3):
    tokenizer = word_tokenizer()
    return [Sample.of(tokenizer, words(60, seed), " " + words(6, 100 + seed)) for seed in range(count)]


def small(method="simulated", ratio=0.5, **options):
    sizes = {"recent": 4, "observe": 8, "channel_multiple": 1, "lowering": "eager"}
    return Settings.of(method=method, ratio=ratio, **sizes | options)


def test_a_row_tells_the_setting_and_all_samples():
    row = studies.row_of(small(), Divergence(random_model(), some_samples()).of(small()))
    assert row["method"] == "simulated" and row["ratio"] == row["effective_ratio"] == 0.5
    assert row["scored"] == row["through_pruned"] == 18
    assert row["kl"][0] == pytest.approx(mean_interval(row["kl_of_samples"]).mean, abs=1e-5)
    assert row["kl"][1] <= row["kl"][0] <= row["kl"][2] and row["kl"][0] > 0.01


def test_a_row_of_a_token_rule_is_found_again():
    """And tells what of the cache is stored."""
    setting = small("think", ratio=0.0, tokens="snapkv:0.5")
    row = studies.row_of(setting, Divergence(random_model(), some_samples()).of(setting))
    assert studies.find([row], setting) is row and studies.find([row], small("think", ratio=0.0)) is None
    assert 0.5 < row["stored_share"] < 1 and row["kl"][0] > 0.001 and row["through_pruned"] == 18


class Last:
    """A press: the latest share of the rows stays."""

    def __init__(self, share):
        self.share = share

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        rows = int(keys.shape[2] * self.share)
        return keys[:, :, -rows:], values[:, :, -rows:]


def test_a_press_reads_what_it_leaves():
    model, samples = random_model(), some_samples()
    divergence = Divergence(model, samples)
    every, some = (
        divergence.of_logits(peers.reader(model, peers.Peer("last", share, Last(share))), {}) for share in (1, 0.25)
    )
    assert max(every.kl) < 1e-6 and every.agreement == [1, 1, 1] and every.through_pruned == 18
    assert min(some.kl) > 0.001


def test_simulated_settings_come_at_once_and_the_others_behind():
    wanted = [small("think"), small(), small("magnitude", ratio=0.25)]
    first, second = studies.measured(wanted, Divergence(random_model(), some_samples()))
    assert [(row["method"], row["ratio"]) for row in first] == [("simulated", 0.5), ("magnitude", 0.25)]
    assert second[0]["method"] == "think"
    assert second[0]["kl"] == pytest.approx(first[0]["kl"], abs=2e-5)


def test_known_rows_are_not_measured_again_and_others_are_replaced(tmp_path):
    path, head = tmp_path / "s.json", {"study": "s", "samples": 3}
    wanted = [small(ratio=0.25), small(ratio=0.5), small("magnitude")]
    result = studies.Result(path, head)
    assert result.missing(wanted) == wanted
    result.add([small("magnitude").described() | {"kl": 1}, small(ratio=0.25).described() | {"kl": 2}], wanted)
    again = studies.Result(path, head)
    assert again.missing(wanted) == [small(ratio=0.5)]
    again.add([small(ratio=0.5).described() | {"kl": 3}, small(ratio=0.75).described() | {"kl": 4}], wanted)
    assert [row["kl"] for row in studies.Result(path, head).rows] == [2, 3, 1]
    assert studies.Result(path, head | {"samples": 4}).missing(wanted) == wanted


def test_the_command_measures_what_is_missing(tmp_path, monkeypatch):
    """From arguments to files; a second run measures nothing."""
    monkeypatch.setattr(studies.demo, "load_demo_model", lambda *args: (random_model(), word_tokenizer()))
    monkeypatch.setattr(studies, "samples_of", lambda *args: some_samples())
    monkeypatch.setattr(studies, "STUDIES", {"ratio": [small(), small("think")], "recent": [small(), small(recent=8)]})
    app = typer.Typer()
    app.command()(studies.main)
    for _ in range(2):
        assert CliRunner().invoke(app, ["all", "--out", str(tmp_path)]).exit_code == 0
        rows = {study: studies.load(tmp_path / f"{study}.json")["rows"] for study in ("ratio", "recent", "energy")}
        assert [row["method"] for row in rows["ratio"]] == ["simulated", "think"]
        assert rows["ratio"][0]["kl"] == rows["recent"][0]["kl"] != rows["recent"][1]["kl"]
        monkeypatch.setattr(studies, "Divergence", None)


def test_energies_of_every_layer_relative_to_the_mean():
    model = random_model()
    rows = studies.energies(model, some_samples(2))
    assert [row["layer"] for row in rows] == list(range(model.config.num_hidden_layers))
    for row in rows:
        scores = torch.tensor(row["scores"])
        assert scores.shape == (model.config.num_key_value_heads, model.config.head_dim)
        torch.testing.assert_close(scores.mean(-1), torch.ones(len(scores)), atol=1e-3, rtol=0)
        assert scores.std() > 0.05


def test_every_study_has_settings_of_its_own():
    for name, settings in studies.STUDIES.items():
        assert len({str(one.described()) for one in settings}) == len(settings), name


def test_an_unknown_study_is_refused_before_a_model_loads():
    app = typer.Typer()
    app.command()(studies.main)
    result = CliRunner().invoke(app, ["ratios"])
    assert result.exit_code == 2 and "no such study" in result.output


def test_plots(tmp_path):
    rows = [
        {"method": method, "ratio": ratio, "kl": [ratio, ratio / 2, 2 * ratio], "agreement": [1 - ratio] * 3}
        for method in ("simulated", "random")
        for ratio in (0.2, 0.1)
    ]
    lines = plots.lines_of(rows, "ratio", lambda row: row["method"], "kl")
    assert lines["simulated"] == [(0.1, [0.1, 0.05, 0.2]), (0.2, [0.2, 0.1, 0.4])] and set(lines) == {
        "simulated",
        "random",
    }
    head = {"model": "m", "samples": 1, "task": "t", "device": "d"}
    drawn = plots.curves(head | {"rows": rows}, "ratio", lambda row: row["method"], tmp_path / "ratio.svg")
    assert "<svg" in drawn.read_text()
    energy = head | {"rows": [{"layer": 0, "scores": [[2.0, 0.5], [1.5, 0.5]]}]}
    assert "<svg" in plots.heat_map(energy, tmp_path / "energy.svg").read_text()
