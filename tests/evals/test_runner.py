"""Runs on tasks of a few lines: records, skipped repetitions, and the output and errors of the commands."""

import importlib.util
import io
import json
import logging
import re
import sys
from argparse import Namespace
from pathlib import Path

import datasets
import pytest
import yaml
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import OfflineModeIsEnabled
from lm_eval.tasks import TaskManager
from random_lm import PRUNED, random_model, word_tokenizer, words
from records import a_record
from rich.console import Console
from typer.testing import CliRunner

from think_compile.commands import app
from think_compile.evals import runner as runner_module
from think_compile.evals.command import _included, batch_size_from, settings_from
from think_compile.evals.model import ThinkLM
from think_compile.evals.runner import Protocol, Runner, grid, load_tasks
from think_compile.evals.table import difference, summary, through_pruned

MEAN = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]
BITS = [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}]
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]
KINDS = {
    "choosing": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": ["w1 w2", "w3", "w4 w5 w6"],
        "doc_to_target": "{{gold}}",
        "metric_list": MEAN,
    },
    "reading": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{context}}",
        "metric_list": BITS,
    },
    "asking": {
        "output_type": "generate_until",
        "doc_to_text": "{{context}} w50 w3",
        "doc_to_target": "w7",
        "generation_kwargs": {"until": ["w9"], "max_gen_toks": 4, "do_sample": False, "prune_before": "w50"},
        "metric_list": EXACT,
    },
}
OPTIONS = ["--recent", 4, "--observe", 8, "--channel-multiple", 1]


def write_tasks(folder):
    """A YAML file for each kind of task, and JSON data for all."""
    docs = [{"context": words(12 + 3 * n, n), "gold": n % 3} for n in range(4)]
    (folder / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"data_files": {"test": str(folder / "docs.jsonl")}, "cache_dir": str(folder / "cache")}
    for name, kind in KINDS.items():
        config = {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test"} | kind
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | {"metadata": {"version": 1.0}}))
    return {name: str(folder / f"{name}.yaml") for name in KINDS}


@pytest.fixture(autouse=True)
def no_look_at_the_machine(monkeypatch):
    """The harness asks pip and others for versions after each run: that takes seconds, and is not kept."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


@pytest.fixture
def harness_logging(monkeypatch):
    """The harness's command line logs to the stream of its first start; each test has another."""
    logger = logging.getLogger("lm_eval")
    monkeypatch.setattr("lm_eval.utils._LOGGING_CONFIGURED", False)
    for name, value in (("handlers", []), ("propagate", True), ("level", logging.NOTSET)):
        monkeypatch.setattr(logger, name, value)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    random_model().save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def made(folder, model=None, tokenizer=None, **protocol):
    tools = (Protocol(**protocol), 2, Console(quiet=True))
    return Runner(model or random_model(), tokenizer or word_tokenizer(), "random", folder, *tools)


def simulated(ratios=(0.5,), methods=("simulated",)):
    return grid(methods, ratios, **{name: value for name, value in PRUNED.items() if name != "ratio"})


def command(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_sentence(result, *found):
    assert result.exit_code == 2, result.output
    *before, last = result.stderr.splitlines()
    assert not any("Traceback" in line for line in before)
    assert last.startswith("think-compile: error: ")
    for word in found:
        assert word in last


# ---------------------------------------------------------------------------------------------------- records


def test_a_record_of_each_task_and_method(paths, tmp_path):
    tasks = load_tasks(list(paths.values()))
    records = made(tmp_path, limit=3).run(tasks, simulated(ratios=(0, 0.5)))
    told = [(record["settings"]["task"], record["settings"]["method"]) for record in records]
    assert told == [(task, method) for task in KINDS for method in ("dense", "simulated", "simulated")]
    for record in records:
        assert len({sample["doc_id"] for sample in record["samples"]}) == 3
        assert record["settings"]["limit"] == 3
        assert "CPU" in record["machine"]
        assert set(record["settings"]["versions"]) == {"think-compile", "torch", "transformers", "lm-eval", "datasets"}
        assert record["seeds"] == {"random_seed": 0, "numpy_seed": 1234, "torch_seed": 1234, "fewshot_seed": 1234}
    for dense, nothing, half in (records[i : i + 3] for i in range(0, 9, 3)):
        assert [through_pruned(record).startswith("0/") for record in (dense, nothing, half)] == [True, True, False]
        assert dense["metrics"] == pytest.approx(nothing["metrics"], rel=1e-5)
        assert [s["filtered_resps"] for s in half["samples"]] != [s["filtered_resps"] for s in dense["samples"]]
    files = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert len(files) == 9
    assert re.fullmatch(r"asking/dense-[0-9a-f]{8}\.json", files[0])
    assert re.fullmatch(r"asking/simulated-0-[0-9a-f]{8}\.json", files[1])


def test_counters_are_of_one_task(paths, tmp_path):
    """The model is wrapped once for all tasks of a method."""
    tasks = load_tasks([paths["choosing"], paths["reading"]])
    dense, _, rolling, _ = made(tmp_path).run(tasks, simulated())
    assert dense["counters"]["scored_tokens"] == 4 * (2 + 1 + 3)
    assert rolling["counters"]["scored_tokens"] == 12 + 15 + 18 + 21


class Refuses:
    def __init__(self, *_, **__):
        raise AssertionError("a model was put to work")


def test_runs_that_are_there_are_not_run_again(paths, tmp_path, monkeypatch):
    tasks, methods = load_tasks([paths["choosing"]]), simulated()
    runner = made(tmp_path)
    first = runner.run(tasks, methods)
    with monkeypatch.context() as patch:
        patch.setattr(runner_module, "ThinkLM", Refuses)
        assert runner.run(tasks, methods) == first
        with pytest.raises(AssertionError, match="put to work"):
            runner.run(tasks, simulated(ratios=(0.25,)))
        with pytest.raises(AssertionError, match="put to work"):
            made(tmp_path, limit=2).run(tasks, methods)


def test_an_interrupted_run_goes_on_where_it_was(paths, tmp_path, monkeypatch):
    tasks, methods = load_tasks(list(paths.values())), simulated()
    answers, asked = Runner._answers, []

    def interrupted(self, lm, task):
        asked.append((task.config.task, lm.settings.method))
        if len(asked) == 5:
            raise KeyboardInterrupt
        return answers(self, lm, task)

    monkeypatch.setattr(Runner, "_answers", interrupted)
    model = random_model()
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, model).run(tasks, methods)
    assert model.config._attn_implementation == "sdpa"  # given back
    assert len(made(tmp_path, model).run(tasks, methods)) == 6
    assert asked[4:] == [("reading", "simulated"), ("reading", "simulated"), ("asking", "simulated")]


def test_a_damaged_record_is_made_again(paths, tmp_path):
    tasks, methods, runner = load_tasks([paths["choosing"]]), simulated(), made(tmp_path)
    first = runner.run(tasks, methods)
    path = runner.path("choosing", methods[1])
    path.write_text(path.read_text()[:100])
    assert runner.run(tasks, methods) == first
    assert json.loads(path.read_text()) == first[1]


def test_a_chat_template_and_examples_change_the_prompts(paths, tmp_path):
    tasks, tokenizer = load_tasks([paths["choosing"]]), word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w9 {{ m['content'] }} {% endfor %}w8"
    dense = simulated()[:1]
    plain, chat = (
        made(tmp_path, tokenizer=tokenizer, apply_chat_template=chat).run(tasks, dense)[0] for chat in (False, True)
    )
    shown = made(tmp_path, tokenizer=tokenizer, num_fewshot=1).run(load_tasks([paths["choosing"]]), dense)[0]
    hashes = [[sample["prompt_hash"] for sample in record["samples"]] for record in (plain, chat, shown)]
    assert len({tuple(one) for one in hashes}) == 3


# ---------------------------------------------------------------------------------------------------- the table


def test_differences_are_paired():
    dense, ours = a_record("dense", [1, 1, 0, 1]), a_record("think", [1, 0, 0, 1])
    found = difference(ours, dense, "acc,none")
    assert (found.mean, found.n) == (-0.25, 4)
    assert found.low < -0.25 < found.high == 0
    console = Console(width=80, file=io.StringIO())
    console.print(summary([dense, ours]))
    shown = console.file.getvalue()
    row = next(line for line in shown.splitlines() if "think 0.5" in line)
    assert "0.5000" in row and "-0.2500 [-0.750, +0.000]" in row and "6/10" in row
    assert "2 of 4 contexts were cut" in " ".join(shown.split())


def test_bits_per_byte_are_weighted_by_bytes():
    dense = a_record("dense", [[-10.0, 8], [-20.0, 40]], "bits_per_byte,none", 30 / 48 / 0.6931471805599453)
    ours = a_record("think", [[-12.0, 8], [-20.0, 40]], "bits_per_byte,none", 32 / 48 / 0.6931471805599453)
    assert difference(ours, dense, "bits_per_byte,none").mean == pytest.approx(2 / 48 / 0.6931471805599453)


def test_other_metrics_have_no_difference():
    dense = a_record("dense", [0.5, 0.25], "f1,none", 0.9)
    assert difference(dense, dense, "f1,none") is None


def test_other_samples_make_no_pairs():
    dense, ours = a_record("dense", [1, 1]), a_record("think", [1, 1, 0])
    with pytest.raises(ValueError, match="other samples"):
        difference(ours, dense, "acc,none")


# ------------------------------------------------------------------------------------------------- tasks and data


def test_tasks_by_name_tag_and_path(paths):
    assert list(load_tasks(["needle_after", paths["asking"]])) == [
        *(f"needle_after_{length}" for length in ("1k", "2k", "4k", "8k")),
        "asking",
    ]


def test_an_unknown_task_is_told_with_what_is_near():
    with pytest.raises(ValueError, match=r"no such task: 'needle_3k'; did you mean .*needle_\dk"):
        load_tasks(["needle_3k"])


@pytest.mark.parametrize(
    "error",
    [
        OfflineModeIsEnabled("offline"),
        ConnectionError("Couldn't reach 'owner/name' on the Hub"),
        DatasetNotFoundError("Dataset 'owner/name' doesn't exist on the Hub or cannot be accessed."),
    ],
    ids=lambda error: type(error).__name__,
)
def test_data_that_cannot_be_had(tmp_path, monkeypatch, error):
    config = {"task": "far", "dataset_path": "owner/name", "dataset_name": "part", "test_split": "test"}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(config | KINDS["choosing"]))
    included = TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(runner_module, "TaskManager", lambda **_: included)

    def unreachable(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(OSError, match=r"task 'far' needs dataset owner/name / part, .*dataset_path to a local folder"):
        load_tasks(["far"])


def test_a_programming_error_in_a_task_is_not_taken_for_missing_data(tmp_path, monkeypatch):
    def broken(*_, **__):
        raise KeyError("split")

    (tmp_path / "far.yaml").write_text(yaml.safe_dump({"task": "far", "dataset_path": "a/b"} | KINDS["choosing"]))
    monkeypatch.setattr(datasets, "load_dataset", broken)
    with pytest.raises(KeyError, match="split"):
        load_tasks([str(tmp_path / "far.yaml")])


# ------------------------------------------------------------------------------------------------------ commands


def test_settings_of_lists():
    found = settings_from("think, random", "0,0.5", lowering="eager")
    assert [one.label for one in found] == ["dense", "think-0", "think-0.5", "random-0", "random-0.5"]
    assert batch_size_from("auto") == "auto" and batch_size_from("8") == 8


def test_eval_prints_a_table_and_writes_records(tiny, paths, tmp_path):
    out = ["--limit", 2, "--output", tmp_path, "--batch-size", 2, "--ratio", "0.5", "--model", tiny]
    result = command("eval", "--tasks", paths["choosing"], *out, *OPTIONS)
    assert result.exit_code == 0, result.output
    assert re.search(r"acc +dense +[01]\.\d{4} +- +2 +0/12", result.stdout)
    assert re.search(r"acc_norm +think 0\.5 +[01]\.\d{4} +[+-]\d\.\d{4} \[.*\] +2 +12/12", result.stdout)
    (path,) = tmp_path.rglob("think-0.5-*.json")
    counters = json.loads(path.read_text())["counters"]
    assert counters["layers_rewritten"] == 2 and counters["lowering"] == "eager"


BAD = {
    "task": (["--tasks", "needle_3k"], "no such task: 'needle_3k'"),
    "no task": (["--tasks", " ,"], "--tasks needs at least one"),
    "ratio": (["--ratio", "0,1.5"], "ratio must be in [0, 1)"),
    "ratio word": (["--ratio", "half"], "--ratio takes numbers"),
    "method": (["--methods", "think,thin"], "method must be one of think, dense"),
    "recent": (["--recent", "-1"], "recent"),
    "batch size": (["--batch-size", "many"], "--batch-size must be a number >= 1 or auto"),
    "device": (["--device", "abacus"], "--device"),
}


@pytest.mark.parametrize(("options", "complaint"), BAD.values(), ids=BAD.keys())
def test_bad_options_of_eval_are_told_before_a_model_is_looked_for(options, complaint):
    tasks = [] if "--tasks" in options else ["--tasks", "needle_1k"]
    assert_one_sentence(command("eval", "--model", "/no/such/model", *tasks, *options), complaint)


def test_a_model_that_is_not_there():
    assert_one_sentence(command("eval", "--model", "./no/such", "--tasks", "needle_1k"), "no such file or folder")


@pytest.mark.parametrize("name", ["eval", "lm-eval"])
def test_without_the_harness_the_extra_is_named(name, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    arguments = ["--tasks", "needle_1k"] if name == "eval" else ["run"]
    assert_one_sentence(command(name, *arguments), "pip install 'think-compile[eval]'")


@pytest.mark.slow  # the harness reads all its tasks
@pytest.mark.usefixtures("harness_logging")
def test_the_harness_knows_our_model_and_finds_tasks_of_both(tiny, paths, tmp_path):
    """The harness's own command line, with our folder of tasks and one of the user's."""
    arguments, folder = sys.argv, Path(paths["choosing"]).parent
    model = f"pretrained={tiny},ratio=0.5,recent=4,channel_multiple=1,method=simulated"
    rest = ["--tasks", "choosing", "--include_path", folder, "--output_path", tmp_path, "--batch_size", 2]
    result = command("lm-eval", "run", "--model", "think", "--model_args", model, *rest)
    assert result.exit_code == 0, result.output
    assert sys.argv is arguments
    written = json.loads(next(tmp_path.rglob("results_*.json")).read_text())
    assert written["config"]["think"]["scored_through_pruned"] == 4 * (2 + 1 + 3)
    assert "choosing" in written["results"]
    listed = command("lm-eval", "ls", "subtasks", "--include_path", folder).stdout
    assert "needle_after_1k" in listed and "choosing" in listed


def test_folders_named_in_a_configuration_of_the_harness(tmp_path):
    (tmp_path / "run.yaml").write_text("include_path: theirs\n")
    config = str(tmp_path / "run.yaml")
    assert _included(Namespace(include_path=None, config=config)) == ["theirs"]
    assert _included(Namespace(include_path="mine", config=config)) == ["mine"]
    assert _included(Namespace(include_path=None)) == []


@pytest.mark.usefixtures("harness_logging")
def test_bad_arguments_of_the_harness_are_one_sentence():
    line = ["run", "--model", "think", "--tasks", "needle_1k", "--model_args"]
    assert_one_sentence(command("lm-eval", *line, "pretrained=/no/such/model,ratio=2"), "ratio must be in [0, 1)")


@pytest.mark.usefixtures("harness_logging")
def test_the_harness_without_a_network(monkeypatch):
    def unreachable(*_, **__):
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    line = ["lm-eval", "run", "--model", "think", "--model_args", "pretrained=none", "--tasks", "piqa"]
    monkeypatch.setattr(ThinkLM, "__init__", lambda *_, **__: None)
    monkeypatch.setattr(ThinkLM, "_rank", 0, raising=False)
    assert_one_sentence(command(*line), "'owner/name'", "HF_HOME", "dataset_path")


@pytest.mark.slow
def test_eval_of_the_real_model(tmp_path):
    tasks = ["--tasks", "needle_1k,needle_after_1k", "--limit", 2]
    result = command("eval", *tasks, "--ratio", "0,0.5", "--lowering", "eager", "--output", tmp_path)
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"acc +think 0 +1\.0000 +\+0\.0000 \[\+0\.000, \+0\.000\] +2 +0/", result.stdout)) == 2
    assert len(re.findall(r"acc +think 0\.5 ", result.stdout)) == 2
