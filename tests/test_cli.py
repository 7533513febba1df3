"""The command line on a tiny saved model: its output, and one sentence for each kind of bad input."""

import importlib.util
import re
import shutil
import sys
import warnings

import pytest
import torch
from tiny import save_tiny_model
from transformers import Gemma2Config, MistralConfig, MistralForCausalLM, T5Config
from typer.testing import CliRunner

from think_compile import cli, hf
from think_compile.commands import app

PROMPT = " ".join(f"w{7 * i % 58}" for i in range(60))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    torch.manual_seed(0)
    return str(save_tiny_model(tmp_path_factory.mktemp("tiny")))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_one_sentence(result, *words):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    assert result.stderr.startswith("think-compile: error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr


def plain_text(folder, prompt, new_tokens):
    model, tokenizer = hf.load_model(folder)
    inputs = tokenizer(prompt, return_tensors="pt")
    mask = inputs["attention_mask"]
    out = model.generate(inputs["input_ids"], attention_mask=mask, max_new_tokens=new_tokens, do_sample=False)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@pytest.mark.versions
def test_generate_at_ratio_zero_streams_the_plain_text(tiny):
    result = run("generate", tiny, "--prompt", PROMPT, "--ratio", 0, "--max-new-tokens", 40, "--lowering", "eager")
    assert result.exit_code == 0, result.output
    assert plain_text(tiny, PROMPT, 40) in " ".join(result.stdout.split())
    assert "key channels kept: 32 of 32" in result.stdout


def test_generate_reports_what_is_stored(tiny, tmp_path):
    (tmp_path / "prompt.txt").write_text(PROMPT * 3)
    options = ["--prompt-file", tmp_path / "prompt.txt", "--recent", 4, "--channel-multiple", 1]
    result = run("generate", tiny, *options, "--ratio", 0.75, "--max-new-tokens", 3, "--lowering", "eager")
    assert result.exit_code == 0, result.output
    assert "layers rewritten: 2 of 2; key channels kept: 8 of 32" in result.stdout
    assert "3 tokens" in result.stdout


def test_explain_names_each_layer_and_reads_no_weights(tiny, tmp_path):
    config_only = tmp_path / "config_only"
    config_only.mkdir()
    shutil.copy(f"{tiny}/config.json", config_only)
    result = run("explain", config_only, "--ratio", 0.5, "--lowering", "eager")
    assert result.exit_code == 0, result.output
    assert "layers.0" in result.stdout and "layers.1" in result.stdout
    assert "16 of 32" in result.stdout


def write_config(folder, config):
    config.save_pretrained(folder)
    return folder / "config.json"


@pytest.mark.versions
def test_explain_of_a_configuration_tells_where_each_cache_lives(tmp_path):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    config = Gemma2Config(
        **heads, hidden_size=64, intermediate_size=64, num_hidden_layers=2, vocab_size=64, sliding_window=16
    )
    result = run("explain", "--config", write_config(tmp_path, config), "--lowering", "eager")
    assert result.exit_code == 0, result.output
    left, rewritten = (next(li for li in result.stdout.splitlines() if f"layers.{i}." in li) for i in (0, 1))
    assert re.search(r"growing cache BHSD in \w+\.layers\[1\]\.keys", rewritten)
    assert "left as it was" in left and "bounded window" in left
    assert re.search(r"\[aten\.\w+\.\w+ \(self\.keys = full_key_states", left)  # the model's line


def test_explain_of_a_large_configuration_needs_no_room_for_weights(tmp_path):
    """Its one layer has 34 billion weights."""
    config = MistralConfig(
        hidden_size=65536, intermediate_size=65536, num_hidden_layers=1, num_attention_heads=512, vocab_size=64
    )
    config.num_key_value_heads, config.head_dim, config.sliding_window = 8, 128, None
    result = run("explain", "--config", write_config(tmp_path, config), "--lowering", "eager", "--prompt-tokens", 40)
    assert result.exit_code == 0, result.output
    assert "512 query and 8 key heads, 64 of 128 channels kept" in result.stdout


@pytest.mark.versions
def test_explain_of_an_encoder_and_decoder(tmp_path):
    config = T5Config(d_model=32, d_kv=32, d_ff=32, num_layers=1, num_heads=2, vocab_size=64, decoder_start_token_id=0)
    result = run("explain", "--config", write_config(tmp_path, config), "--lowering", "eager", "--prompt-tokens", 24)
    assert result.exit_code == 0, result.output
    assert "1 layers rewritten, 2 left as they were" in result.stdout
    assert any("SelfAttention: growing cache" in line for line in result.stdout.splitlines())
    assert any("left as it was: decoder.block.0.layer.1.EncDecAttention" in li for li in result.stdout.splitlines())


def test_explain_of_a_model_whose_code_reads_values(tiny, monkeypatch):
    """Fake tensors have no values, so the model is explained with random weights."""
    plain, values = hf._next_token, []

    def next_token(output):
        values.append(output.logits.sum().item())
        return plain(output)

    monkeypatch.setattr(hf, "_next_token", next_token)
    result = run("explain", "--config", f"{tiny}/config.json", "--lowering", "eager", "--prompt-tokens", 8)
    assert result.exit_code == 0, result.output
    assert len(values) == 1
    assert "2 layers rewritten" in result.stdout


def test_explain_needs_exactly_one_model(tiny, tmp_path):
    assert_one_sentence(run("explain"), "exactly one of MODEL and --config")
    assert_one_sentence(run("explain", tiny, "--config", f"{tiny}/config.json"), "exactly one of MODEL and --config")
    assert_one_sentence(run("explain", "--config", tmp_path / "none.json"), "none.json")
    (tmp_path / "config.json").write_text("{}")
    assert_one_sentence(run("explain", "--config", tmp_path / "config.json"), "cannot load", "config.json")


def test_strict_fails_where_a_layer_stays_dense(tmp_path):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    save_tiny_model(tmp_path)  # for its tokenizer
    MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=16)).save_pretrained(tmp_path)
    assert "sliding" in run("explain", tmp_path, "--lowering", "eager").stdout
    generate = ["generate", tmp_path, "--prompt", PROMPT, "--lowering", "eager", "--max-new-tokens", 3]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as with PYTHONWARNINGS
        assert "sliding" in run(*generate).stderr
    assert_one_sentence(run(*generate, "--strict"), "sliding")
    assert_one_sentence(run("explain", tmp_path, "--lowering", "eager", "--strict"), "sliding")
    explained = run("explain", tmp_path, "--lowering", "eager", "--recent", "4", "--sliding", "--strict").stdout
    assert "1 layers rewritten" in explained
    assert "sliding cache" in explained


BAD_INPUT = {
    "ratio above": (["--ratio", "1.5"], "ratio"),
    "ratio nan": (["--ratio", "nan"], "ratio"),
    "recent": (["--recent", "-1"], "recent"),
    "observe": (["--observe", "0"], "observe"),
    "multiple": (["--channel-multiple", "0"], "channel_multiple"),
    "lowering": (["--lowering", "fast"], "lowering"),
    "dtype": (["--dtype", "int3"], "--dtype"),
    "device": (["--device", "abacus"], "--device"),
    "no such gpu": (["--device", "cuda:99"], "cuda:99"),
}


@pytest.mark.parametrize(("options", "word"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_option_is_one_sentence(tiny, options, word):
    assert_one_sentence(run("generate", tiny, "--prompt", PROMPT, *options), word)


def test_bad_option_fails_before_the_model_is_looked_for():
    assert_one_sentence(run("generate", "/no/such/model", "--prompt", "a", "--ratio", 2), "ratio")


def test_generate_needs_exactly_one_prompt(tiny, tmp_path):
    assert_one_sentence(run("generate", tiny), "--prompt")
    assert_one_sentence(run("generate", tiny, "--prompt", "a", "--prompt-file", tmp_path), "exactly one")
    assert_one_sentence(run("generate", tiny, "--prompt-file", tmp_path / "none.txt"), "none.txt")
    assert_one_sentence(run("generate", tiny, "--prompt", ""), "empty")


def test_chat_without_a_template_is_one_sentence(tiny):
    assert_one_sentence(run("generate", tiny, "--prompt", PROMPT, "--chat"), "chat_template")


@pytest.mark.parametrize("source", ["./no/such/folder", "/no/such.gguf", "no_such.gguf"])
def test_missing_model_is_one_sentence(source):
    assert_one_sentence(run("explain", source), source)


def test_folder_without_a_model_is_one_sentence(tmp_path):
    assert_one_sentence(run("generate", tmp_path, "--prompt", "a"), "cannot load", str(tmp_path))


def test_gguf_without_its_readers_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert_one_sentence(run("explain", tmp_path / "model.gguf"), "gguf and accelerate", "think-compile[demo]")


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_missing_command_line_package_names_the_extra(package, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "think_compile.commands")
    with pytest.raises(SystemExit, match=rf"needs {package}: pip install 'think-compile\[demo\]'"):
        cli.main()
