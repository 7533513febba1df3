"""Records become rows: every one, with differences to the dense record of the same samples."""

import json

import pytest
import typer
from records import a_record
from typer.testing import CliRunner

from evals.collect import head_of, rows_of
from evals.collect import main as collect

BITS = "bits_per_byte,none"


def records():
    bits = [[-10.0, 8], [-20.0, 40]], BITS, 30 / 48 / 0.6931471805599453
    return [
        a_record("think", [1, 0, 0, 1]),
        a_record("think", [1, 1, 0, 1], ratio=0),
        a_record("dense", [1, 1, 0, 1]),
        a_record("dense", *bits, task="another"),
        a_record("random", *bits, task="another"),
    ]


def test_rows_are_by_task_method_and_ratio():
    rows = list(rows_of(records()))
    told = [(row["task"], row["method"], row.get("ratio")) for row in rows]
    assert told == [
        ("another", "dense", None),
        ("another", "random", 0.5),
        ("some", "dense", None),
        ("some", "think", 0),
        ("some", "think", 0.5),
    ]
    assert [row["less_dense"].get("acc,none", [None])[0] for row in rows] == [None, None, None, 0, -0.25]
    assert rows[1]["less_dense"][BITS] == [0, 0, 0]
    assert rows[4]["samples"] == {"acc,none": [1, 0, 0, 1]}
    assert (rows[4]["n"], rows[4]["through_pruned"], rows[4]["cut_contexts"]) == (4, "6/10", 2)


def test_the_command_writes_one_file(tmp_path):
    for number, record in enumerate(records()):
        path = tmp_path / "records" / record["settings"]["task"] / f"{number}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record))
    app = typer.Typer()
    app.command()(collect)
    ran = CliRunner().invoke(app, [str(tmp_path / "records"), "--out", str(tmp_path / "tasks.json")])
    assert ran.exit_code == 0, ran.output
    written = json.loads((tmp_path / "tasks.json").read_text())
    assert written["rows"] == json.loads(json.dumps(list(rows_of(records()))))
    assert (written["device"], written["model"], written["versions"]) == ("a machine", "m", {"torch": "2"})


def test_a_task_needs_its_dense_record():
    with pytest.raises(ValueError, match="some has 0 dense records"):
        list(rows_of([a_record("think", [1])]))


def test_one_setting_has_one_record():
    with pytest.raises(ValueError, match="two records of one setting"):
        list(rows_of([a_record("dense", [1]), a_record("think", [1]), a_record("think", [0])]))


@pytest.mark.parametrize("other", [[], [a_record("dense", [1], model="n"), a_record("dense", [1])]], ids=len)
def test_records_of_one_file_agree(other):
    with pytest.raises(ValueError, match="agree in what made them"):
        head_of(other)
