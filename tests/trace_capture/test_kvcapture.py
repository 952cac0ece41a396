"""kvcapture as a user runs it: what it writes is what the model computed, and what it refuses leaves nothing behind."""
import json
import os
import pathlib
import re
import resource
import signal
import subprocess
import time

import numpy as np
import pytest

from capture_harness import (CONTEXT, FINEWEB, HEAD_DIM, HIDDEN, KVCAPTURE, N_HEADS, N_KV_HEADS, N_LAYERS, ROOT, VOCAB,
                             assert_refused, assert_verified, kvcapture, kvreplay, kvtrace, make_model,
                             read_safetensors)

TEXT = json.loads((FINEWEB / "fineweb_2048.json").read_text())


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def slow_model(tmp_path_factory):
    """A context that takes long enough to be interrupted."""
    return make_model(tmp_path_factory.mktemp("models") / "slow", max_position_embeddings=200000)


@pytest.fixture(scope="module")
def fineweb(tmp_path_factory):
    """The committed model reading its text, in float32."""
    out = tmp_path_factory.mktemp("fineweb") / "fineweb.h5"
    done = kvcapture("--model", FINEWEB, "--tokens", FINEWEB / "fineweb_2048.json", "--teacher-forced", "--dtype", "f32",
                     "--check-steps", 16, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "2048 tokens (1024 prompt, 1024 decode)" in done.stdout, done.stdout
    assert "--queries window:64 would take" in done.stderr, done.stderr
    return out


def ids_file(folder, ids, **more):
    path = pathlib.Path(folder) / "ids.json"
    path.write_text(json.dumps({"prompt": ids, **more} if more else ids))
    return path


def captured(model, out, *arguments, ids=(1, 5, 9, 2), n=12, **more):
    """A capture that must succeed, opened."""
    tokens = ids_file(out.parent, list(ids))
    done = kvcapture("--model", model, "--tokens", tokens, "--max-new-tokens", n, "--out", out, "--quiet", "--threads", "1",
                     *arguments, **more)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", done.stderr
    return kvtrace.open(str(out))


def logprob_of(trace):
    return trace.file["tokens/logprob"][:trace.n_tokens]


def pieces_of(trace):
    return [piece.decode() for piece in trace.file["tokens/piece"][:trace.n_tokens]]


def content_hash(path):
    return json.loads(kvreplay("info", "--json", path).stdout)["content_hash"]


# What the trace holds.

def test_a_capture_is_proved_and_replays(fineweb, tmp_path):
    text = assert_verified(fineweb)
    assert text.count("proved") == 4
    done = kvreplay("run", fineweb, "-m", "h2o", "streaming", "-b", "64", "--layers", "2", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "summary.csv").exists()


def test_q_k_v_and_log_probabilities_are_the_references(fineweb):
    folder = ROOT / "tests" / "trace_capture" / "fineweb"
    reference, rows = read_safetensors(folder / "model.safetensors"), json.loads((folder / "reference.json").read_text())["rows"]
    trace = kvtrace.open(str(fineweb))
    for layer in range(4):
        for name, read in (("q", trace.q), ("k", trace.k), ("v", trace.v)):
            expected = reference[f"{name}.{layer}"]
            found = np.asarray(read(layer))[:, rows]
            rms = np.sqrt(np.mean(np.square(expected)))
            assert np.abs(found - expected).max() / rms < 1e-4, (name, layer)
    logprob = logprob_of(trace)
    assert np.isnan(logprob[0])
    n = min(len(reference["logprob"]), 2047)
    assert np.abs(logprob[1:n + 1] - reference["logprob"][:n]).max() < 2e-4


def test_generated_tokens_are_the_reference_and_reading_them_gives_the_same_trace(tmp_path):
    reference = json.loads((FINEWEB / "greedy_reference.json").read_text())
    prompt, greedy = reference["prompt_token_ids"], reference["greedy_continuation"]
    assert len(greedy) == 64
    trace = captured(FINEWEB, tmp_path / "a.h5", "--dtype", "f32", "--ignore-eos", ids=prompt, n=64)
    assert list(trace.token_ids) == prompt + greedy
    assert trace.prompt_len == len(prompt)
    tokens = ids_file(tmp_path, prompt, decode=greedy)
    done = kvcapture("--model", FINEWEB, "--tokens", tokens, "--teacher-forced", "--dtype", "f32", "--out",
                     tmp_path / "b.h5", "--quiet")
    assert done.returncode == 0, done.stderr
    again = kvtrace.open(str(tmp_path / "b.h5"))
    assert np.allclose(logprob_of(trace), logprob_of(again), atol=2e-4, equal_nan=True)
    for layer in range(4):
        for read, other in ((trace.q, again.q), (trace.k, again.k), (trace.v, again.v)):
            assert np.allclose(read(layer), other(layer), atol=1e-3)


def test_same_command_same_bytes_for_any_number_of_threads(model, tmp_path):
    sampled = ("--temperature", "1", "--seed", "7")
    captured(model, tmp_path / "a.h5", *sampled)
    captured(model, tmp_path / "another_name.h5", *sampled, "--stage", "1B", "--layers", "0-2")
    captured(model, tmp_path / "c.h5", *sampled[:3], "8")
    two = kvcapture("--model", model, "--tokens", tmp_path / "ids.json", "--max-new-tokens", 12, *sampled, "--threads", 2,
                    "--out", tmp_path / "b.h5")
    assert two.returncode == 0, two.stderr
    assert content_hash(tmp_path / "a.h5") == content_hash(tmp_path / "another_name.h5")
    assert content_hash(tmp_path / "a.h5") == content_hash(tmp_path / "b.h5")
    assert content_hash(tmp_path / "a.h5") != content_hash(tmp_path / "c.h5")


@pytest.mark.parametrize("dtype, expected", [("model", "f32"), ("f16", "f16"), ("bf16", "bf16"), ("f32", "f32")])
def test_dtype(model, tmp_path, dtype, expected):
    trace = captured(model, tmp_path / "a.h5", "--dtype", dtype)
    assert json.loads(kvreplay("info", "--json", tmp_path / "a.h5").stdout)["element"] == expected
    assert_verified(tmp_path / "a.h5")
    # Attention saw what is stored, so that the first layer differs by one rounding, and later ones by what follows.
    tokens = ids_file(tmp_path, [1, 5, 9, 2], decode=[int(i) for i in trace.token_ids[4:]])
    done = kvcapture("--model", model, "--tokens", tokens, "--teacher-forced", "--dtype", "f32", "--out",
                     tmp_path / "b.h5", "--quiet", "--threads", 1)
    assert done.returncode == 0, done.stderr
    exact = kvtrace.open(str(tmp_path / "b.h5"))
    step = {"f16": 2 ** -11, "bf16": 2 ** -8, "f32": 0}[expected]
    for layer in range(N_LAYERS):
        for read, other in ((trace.q, exact.q), (trace.k, exact.k), (trace.v, exact.v)):
            a, b = np.asarray(read(layer), np.float64), np.asarray(other(layer), np.float64)
            bound = step * np.abs(b) + 1e-5 if layer == 0 else 20 * step * np.abs(b).max() + 1e-4
            assert (np.abs(a - b) <= bound).all()


def test_layers_queries_and_w_o(model, tmp_path):
    whole = captured(model, tmp_path / "a.h5")
    trace = captured(model, tmp_path / "b.h5", "--layers", "0,2", "--queries", "window:2", "--with", "w_o",
                     "--check-steps", "3")
    assert list(trace.layers) == [0, 2]
    weights = read_safetensors(model / "model.safetensors")
    for layer in (0, 2):
        assert list(trace.q_index(layer)) == list(range(2, 16))
        assert np.array_equal(trace.q(layer), np.asarray(whole.q(layer))[:, 2:])
        assert np.array_equal(trace.k(layer), whole.k(layer))
        assert np.array_equal(trace.w_o(layer), weights[f"model.layers.{layer}.self_attn.o_proj.weight"])
        assert np.asarray(trace.k(layer)).shape == (N_KV_HEADS, 16, HEAD_DIM)
        assert np.asarray(trace.w_o(layer)).shape == (HIDDEN, N_HEADS * HEAD_DIM)
    assert "6 outputs" not in assert_verified(tmp_path / "b.h5")
    captured(model, tmp_path / "c.h5", "--queries", "decode", "--check-steps", "0")
    assert "proved" not in assert_verified(tmp_path / "c.h5", proved=False)


def test_what_the_file_says_of_its_origin(model, tmp_path):
    captured(model, tmp_path / "a.h5", "--temperature", "0.5", "--top-k", "3", "--provenance", "Random weights.")
    info = json.loads(kvreplay("info", "--json", tmp_path / "a.h5").stdout)
    generator = info["generator"] if isinstance(info["generator"], dict) else json.loads(info["generator"])
    assert generator["tool"] == "kvcapture"
    assert generator["argv"][1:3] == ["--model", str(model)]
    assert generator["device"] == "cpu"
    assert generator["decode"] == "generated"
    assert generator["sampling"] == {"temperature": 0.5, "top_p": 1.0, "top_k": 3, "seed": 0}
    assert info["provenance"].startswith("Random weights. ") and "sampled" in info["provenance"]
    done = kvcapture("--model", model, "--tokens", ids_file(tmp_path, [1], decode=[2, 3]), "--teacher-forced", "--out",
                     tmp_path / "b.h5")
    assert done.returncode == 0, done.stderr
    assert "Teacher-forced" in json.loads(kvreplay("info", "--json", tmp_path / "b.h5").stdout)["provenance"]


def test_it_ends_at_eos_unless_told_otherwise(model, tmp_path):
    ids = list(captured(model, tmp_path / "a.h5", n=40).token_ids)
    eos = ids[9]
    first = ids.index(eos, 4)
    ending = make_model(tmp_path / "ending", eos_token_id=int(eos))
    assert list(captured(ending, tmp_path / "b.h5", n=40).token_ids) == ids[:first + 1]
    assert_verified(tmp_path / "b.h5")
    assert list(captured(ending, tmp_path / "c.h5", "--ignore-eos", n=40).token_ids) == ids
    done = kvcapture("--model", ending, "--tokens", ids_file(tmp_path, [1, 5, 9, 2]), "--max-new-tokens", 40, "--out",
                     tmp_path / "d.h5", "--json", "--quiet")
    summary = json.loads(done.stdout)
    assert summary["ended_at_eos"] and summary["complete"] and summary["n_tokens"] == first + 1
    assert done.stderr == ""


def test_spans(model, tmp_path):
    (tmp_path / "spans.json").write_text('{"needle": [1, 3], "all": [0, 16]}')
    captured(model, tmp_path / "a.h5", "--spans", tmp_path / "spans.json")
    info = kvreplay("info", tmp_path / "a.h5").stdout
    assert "needle" in info, info


def test_many_prompts(model, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"tokens": [1, 2, 3], "decode": [4, 5], "name": "first"}\n'
                                      '{"tokens": [7], "decode": [8, 9, 10], "spans": {"s": [0, 1]}}\n')
    out = tmp_path / "traces"
    arguments = ("--model", model, "--prompts", tmp_path / "p.jsonl", "--teacher-forced", "--out", out)
    done = kvcapture(*arguments)
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(out)) == ["first.h5", "prompt-0002.h5"]
    assert len(done.stdout.splitlines()) == 2
    first = kvtrace.open(str(out / "first.h5"))
    assert list(first.token_ids) == [1, 2, 3, 4, 5] and first.prompt_len == 3
    assert list(kvtrace.open(str(out / "prompt-0002.h5")).token_ids) == [7, 8, 9, 10]
    for name in os.listdir(out):
        assert_verified(out / name)
    before = content_hash(out / "first.h5")
    assert_refused(kvcapture(*arguments), 2, "first.h5 exists already", "--force")
    # What one prompt left in the cache does not reach the next one.
    captured(model, tmp_path / "alone.h5", ids=[7], n=0)
    assert np.array_equal(kvtrace.open(str(tmp_path / "alone.h5")).k(2)[:, :1],
                          kvtrace.open(str(out / "prompt-0002.h5")).k(2)[:, :1])
    assert kvcapture(*arguments, "--force").returncode == 0
    assert content_hash(out / "first.h5") == before


def test_config_file(model, tmp_path):
    ids_file(tmp_path, [1, 2, 3])
    (tmp_path / "job.ini").write_text(f"# a job\nmodel = {model}\ntokens = {tmp_path}/ids.json\nmax-new-tokens = 5\n"
                                      f"layers = 1\nignore-eos = true\nout = {tmp_path}/a.h5\n")
    done = kvcapture("--config", tmp_path / "job.ini", "--max-new-tokens", "7")
    assert done.returncode == 0, done.stderr
    trace = kvtrace.open(str(tmp_path / "a.h5"))
    assert len(trace.token_ids) == 10 and list(trace.layers) == [1]


def test_dry_run_says_what_would_be_written(model, tmp_path):
    arguments = ("--model", model, "--tokens", ids_file(tmp_path, [1] * 80), "--max-new-tokens", 10, "--out",
                 tmp_path / "a.h5", "--queries", "all")
    done = kvcapture(*arguments, "--dry-run")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    said = json.loads(done.stdout)
    assert not (tmp_path / "a.h5").exists() and sorted(os.listdir(tmp_path)) == ["ids.json"]
    trace = said["traces"][0]
    assert (trace["n_tokens"], trace["prompt_len"], trace["n_queries"], trace["n_check"]) == (90, 80, 90, 14)
    assert said["fits"] and said["dtype"] == "f32" and said["layers"] == [0, 1, 2]
    bulk = 4 * N_LAYERS * HEAD_DIM * (2 * N_KV_HEADS * 90 + N_HEADS * (90 + 14))
    assert bulk < said["bytes"] < bulk + 100000
    assert said["bytes"] - said["bytes_window_64"] == 4 * N_LAYERS * N_HEADS * HEAD_DIM * 16 - 4 * N_LAYERS * 74
    assert kvcapture(*arguments, "--quiet").returncode == 0
    assert os.path.getsize(tmp_path / "a.h5") <= said["bytes"]


# Text.

def test_text_goes_through_the_tokenizer(tmp_path):
    source = ROOT / "tests" / "trace_capture" / "tokenizers" / "gpt2" / "tokenizer.json"
    tokenizer = json.loads(source.read_text())
    vocab = max([*tokenizer["model"]["vocab"].values(), *(t["id"] for t in tokenizer["added_tokens"])]) + 3
    model = make_model(tmp_path / "model", vocab=vocab)
    (model / "tokenizer.json").write_text(source.read_text())
    (tmp_path / "prompt.txt").write_text("Hello w\u00f6rld")
    done = kvcapture("--model", model, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 6, "--out",
                     tmp_path / "a.h5", "--quiet")
    assert done.returncode == 0, done.stderr
    trace = kvtrace.open(str(tmp_path / "a.h5"))
    pieces = "".join(pieces_of(trace)[:trace.prompt_len])
    assert pieces.lstrip() == "Hello w<0xC3><0xB6>rld", pieces
    done = kvcapture("--model", model, "--prompt", "Hello w\u00f6rld", "--max-new-tokens", 6, "--out", tmp_path / "b.h5",
                     "--quiet")
    assert done.returncode == 0, done.stderr
    assert content_hash(tmp_path / "a.h5") == content_hash(tmp_path / "b.h5")
    (tmp_path / "prompt.txt").write_bytes(b"ab\xff")
    assert_refused(kvcapture("--model", model, "--prompt-file", tmp_path / "prompt.txt", "--max-new-tokens", 6, "--out",
                             tmp_path / "c.h5"), 2, "prompt.txt", "UTF-8")
    assert_refused(kvcapture("--model", model, "--prompt", "", "--max-new-tokens", 6, "--out", tmp_path / "c.h5"), 2,
                   "--prompt", "empty")


def test_text_without_a_tokenizer(model, tmp_path):
    assert_refused(kvcapture("--model", model, "--prompt", "Hello", "--max-new-tokens", 1, "--out", tmp_path / "a.h5"),
                   2, "tokenizer.json", "--tokens")


# What is refused.

@pytest.mark.parametrize("arguments, words", [
    (("--modle", "x"), ("--modle", "--model")),
    (("--max-new", "3"), ("--max-new", "--max-new-tokens")),
    (("--queries", "some"), ("'some'", "window:N")),
    (("--dtype", "fp16"), ("'fp16'", "f16")),
    (("--device", "gpu"), ("'gpu'", "cuda")),
    (("--layers", "0,3"), ("layer 3", "0 to 2")),
    (("--layers", "a"), ("--layers", "'a'")),
    (("--with", "v_o"), ("'v_o'", "w_o")),
    (("--check-steps", "-1"), ("--check-steps", "'-1'")),
    (("--temperature", "-1"), ("--temperature", "'-1'")),
    (("--temperature", "nan"), ("--temperature", "'nan'")),
    (("--temperature", "1", "--top-p", "0"), ("--top-p", "'0'", "at most 1")),
    (("--top-k", "5"), ("--top-k", "--temperature")),
    (("--stage", "much"), ("--stage", "'much'")),
    (("--threads", "0"), ("--threads", "'0'")),
    (("--max-new-tokens", "93"), ("4 tokens", "93", "97", str(CONTEXT))),
    (("--max-new-tokens", "-3"), ("--max-new-tokens", "'-3'")),
    (("--max-new-tokens", "3", "--max-new-tokens", "4"), ("--max-new-tokens", "more than once")),
    (("--teacher-forced",), ("--teacher-forced", "decode")),
    (("--prompt", "a"), ("--prompt", "2 are given")),
    (("--spans", "nowhere.json"), ("nowhere.json",)),
    (("--config", "nowhere.ini"), ("nowhere.ini",)),
    (("--config", "/"), ("folder",)),
    (("--spans", ""), ("--spans", "file")),
    (("stray",), ("stray",)),
    (("--out",), ("--out",)),
    (("--force=yes",), ("--force",)),
])
def test_refused_before_anything_is_made(model, tmp_path, arguments, words):
    base = {"--model": model, "--tokens": ids_file(tmp_path, [1, 5, 9, 2]), "--max-new-tokens": 3,
            "--out": tmp_path / "a.h5"}
    given = set(arguments)
    first = [word for name, value in base.items() if name not in given for word in (name, value)]
    assert_refused(kvcapture(*first, *arguments), 2, *words)
    assert sorted(os.listdir(tmp_path)) == ["ids.json"]


@pytest.mark.parametrize("missing", ["--model", "--tokens", "--max-new-tokens", "--out"])
def test_what_is_missing_is_named(model, tmp_path, missing):
    base = {"--model": model, "--tokens": ids_file(tmp_path, [1, 5]), "--max-new-tokens": 3, "--out": tmp_path / "a.h5"}
    done = kvcapture(*[word for name, value in base.items() if name != missing for word in (name, value)])
    assert_refused(done, 2, missing)


@pytest.mark.parametrize("text, words", [
    ("[1, 2", (":1", "ends too early")),
    ("[1,\n\n}", (":3", "}")),
    ("[]", ("empty",)),
    ("[1, 48]", ("[1] is 48", "0 to 47")),
    ('{"prompt": [1], "decode": [2]}', ("--teacher-forced",)),
    ('{"promt": [1]}', ("prompt",)),
    ("[1" + ", 1" * CONTEXT + "]", (f"{CONTEXT + 1} tokens", f"is {CONTEXT}")),
    ("\x00\x01", (":1",)),
    ("[" * 100000, (":1",)),
    ("[" * 100000 + "]" * 100000, (":1", "nested")),
    ('{"prompt": [1], "prompt": [2]}', ("prompt", "twice")),
    ("[1e999]", (":1", "too large")),
])
def test_token_files(model, tmp_path, text, words):
    (tmp_path / "ids.json").write_text(text)
    done = kvcapture("--model", model, "--tokens", tmp_path / "ids.json", "--max-new-tokens", 0, "--out",
                     tmp_path / "a.h5")
    assert_refused(done, 2, "ids.json", *words)
    assert sorted(os.listdir(tmp_path)) == ["ids.json"]


@pytest.mark.parametrize("text, words", [
    ('{"tokens": [1]}\n{"tokens": [1]\n', (":2", "too early")),
    ('{"tokens": [1], "name": "a"}\n{"tokens": [2], "name": "a"}\n', (":2", "'a'", "p.jsonl:1")),
    ('{"tokens": [1], "name": "../a"}\n', (":1", "name")),
    ('{"tokens": [1]}\n\n{"tokens": [99]}\n', (":3", "99", "0 to 47")),
    ('{"tokens": [1], "spans": {"s": [0, 9]}}\n', (":1", "'s'", "[0, 9)", "4 tokens")),
    ("", ("no prompt",)),
])
def test_prompt_files(model, tmp_path, text, words):
    (tmp_path / "p.jsonl").write_text(text)
    done = kvcapture("--model", model, "--prompts", tmp_path / "p.jsonl", "--max-new-tokens", 3, "--out",
                     tmp_path / "out")
    assert_refused(done, 2, "p.jsonl", *words)
    assert sorted(os.listdir(tmp_path)) == ["p.jsonl"]


@pytest.mark.parametrize("line, words", [
    ("modle = x", ("job.ini", "--modle", "--model")),
    ("model", ("job.ini", "'model'", "name = value")),
    ("ignore-eos = perhaps", ("job.ini", "--ignore-eos", "true or false")),
    ("config = other.ini", ("job.ini", "another")),
    ("prompt = What is C#?", ("job.ini:1", "comment")),
])
def test_config_files(model, tmp_path, line, words):
    (tmp_path / "job.ini").write_text(line + "\n")
    done = kvcapture("--config", tmp_path / "job.ini", "--tokens", ids_file(tmp_path, [1]), "--max-new-tokens", 1,
                     "--out", tmp_path / "a.h5")
    assert_refused(done, 2, *words)


def test_inputs_from_a_pipe(model, tmp_path):
    done = subprocess.run(["bash", "-c", f"{KVCAPTURE} --model {model} --tokens <(echo '[1, 5]') --max-new-tokens 3 --out "
                           f"{tmp_path}/a.h5"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert list(kvtrace.open(str(tmp_path / "a.h5")).token_ids[:2]) == [1, 5]


def test_models_that_are_none(tmp_path):
    arguments = ("--tokens", ids_file(tmp_path, [1]), "--max-new-tokens", 1, "--out", tmp_path / "a.h5")
    assert_refused(kvcapture("--model", tmp_path / "nowhere", *arguments), 2, "nowhere")
    broken = make_model(tmp_path / "broken", num_key_value_heads=3)
    assert_refused(kvcapture("--model", broken, *arguments), 2, "config.json")
    other = make_model(tmp_path / "other", architectures=["GptNeoXForCausalLM"], model_type="gpt_neox")
    assert_refused(kvcapture("--model", other, *arguments), 2, "GptNeoX")
    assert not (tmp_path / "a.h5").exists()


def test_values_beyond_f16_are_refused_with_the_way_out(tmp_path):
    loud = make_model(tmp_path / "loud", scale_v=1e6)
    arguments = ("--model", loud, "--tokens", ids_file(tmp_path, [1, 2, 3]), "--max-new-tokens", 2, "--out",
                 tmp_path / "a.h5")
    assert_refused(kvcapture(*arguments, "--dtype", "f16"), 2, "layer 0: v of head", "65504", "--dtype bf16")
    assert sorted(os.listdir(tmp_path)) == ["ids.json", "loud"]
    assert kvcapture(*arguments, "--dtype", "bf16").returncode == 0
    assert_verified(tmp_path / "a.h5")


def test_logits_that_are_not_finite_are_refused(tmp_path):
    broken = make_model(tmp_path / "broken", scale_logits=3e38)
    out = ("--out", tmp_path / "a.h5")
    ids = ids_file(tmp_path, [1, 2, 3])
    assert_refused(kvcapture("--model", broken, "--tokens", ids, "--max-new-tokens", 2, *out), 1, "finite")
    read = ids_file(tmp_path, [1, 2, 3], decode=[4, 5])
    assert_refused(kvcapture("--model", broken, "--tokens", read, "--teacher-forced", *out), 1, "finite")
    assert sorted(os.listdir(tmp_path)) == ["broken", "ids.json"]


def test_no_gpu_is_exit_4(model, tmp_path):
    if "cuda=ON" in kvcapture("--version").stdout:
        pytest.skip("built with CUDA")
    assert_refused(kvcapture("--model", model, "--tokens", ids_file(tmp_path, [1]), "--max-new-tokens", 1, "--out",
                             tmp_path / "a.h5", "--device", "cuda"), 4, "CUDA")
    assert sorted(os.listdir(tmp_path)) == ["ids.json"]


def test_existing_files_are_kept(model, tmp_path):
    out = tmp_path / "a.h5"
    out.write_text("mine")
    arguments = ("--model", model, "--tokens", ids_file(tmp_path, [1]), "--max-new-tokens", 1, "--out", out)
    assert_refused(kvcapture(*arguments), 2, out, "--force")
    assert out.read_text() == "mine"
    assert kvcapture(*arguments, "--force").returncode == 0
    assert_verified(out)
    out.unlink()
    (tmp_path / "a.h5.part").write_text("half of mine")
    assert_refused(kvcapture(*arguments), 2, "a.h5.part", "kvreplay recover", "--force")
    assert (tmp_path / "a.h5.part").read_text() == "half of mine"
    assert_refused(kvcapture(*arguments[:-1], tmp_path), 2, tmp_path, "is a folder")
    assert_refused(kvcapture(*arguments[:-1], tmp_path / "no" / "a.h5"), 2, tmp_path / "no", "not a folder")
    assert_refused(kvcapture(*arguments[:-1], "/dev/full", "--force"), 2, "/dev/full", "file")


def test_a_folder_that_cannot_be_written(model, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write everywhere")
    assert_refused(kvcapture("--model", model, "--tokens", ids_file(tmp_path, [1]), "--max-new-tokens", 1, "--out",
                             closed / "a.h5"), 2, closed)


def test_streams_that_cannot_be_written(model, tmp_path):
    """A closed stream's number must not become that of the trace, where messages would go into it."""
    command = (f"{KVCAPTURE} --model {model} --tokens {ids_file(tmp_path, [1, 2, 3])} --max-new-tokens 4 --force "
               f"--out {tmp_path}/a.h5 --threads 1 ")
    for streams, code in ((">/dev/full", 1), (">&-", 1), ("2>/dev/full", 0), ("2>&-", 0), ("<&- 2>&- >/dev/null", 0),
                          ("2>/dev/full --dtype fp16", 2)):
        done = subprocess.run(["bash", "-c", command + streams], capture_output=True, text=True, timeout=60)
        assert done.returncode == code, (streams, done.returncode, done.stderr)
        assert_verified(tmp_path / "a.h5")


# What happens when it is stopped.

def test_two_captures_to_one_file(slow_model, tmp_path):
    """The second one is refused, also with --force, and the first one ends well."""
    process = start(slow_model, tmp_path / "a.h5", tmp_path, n=3000)
    while not (tmp_path / "a.h5.part").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    other = ("--model", slow_model, "--tokens", tmp_path / "ids.json", "--max-new-tokens", 5, "--out", tmp_path / "a.h5")
    assert_refused(kvcapture(*other), 2, "a.h5.part")
    assert_refused(kvcapture(*other, "--force"), 3, "a.h5.part", "another process")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_verified(tmp_path / "a.h5")
    assert len(kvtrace.open(str(tmp_path / "a.h5")).token_ids) == 3003


def test_a_file_that_may_not_grow_is_a_sentence(slow_model, tmp_path):
    def limit():  # not lower: the thread sanitizer writes half a MiB of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = kvcapture("--model", slow_model, "--tokens", ids_file(tmp_path, [1] * 1500), "--max-new-tokens", 20, "--out",
                     tmp_path / "a.h5", preexec_fn=limit)
    assert_refused(done, 3, "a.h5")
    assert sorted(os.listdir(tmp_path)) == ["ids.json"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MiB, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=False)


def test_too_little_space_is_said_before_the_first_step(slow_model, small_disk, tmp_path):
    done = kvcapture("--model", slow_model, "--tokens", ids_file(tmp_path, [1]), "--max-new-tokens", 30000, "--out",
                     small_disk / "a.h5")
    assert_refused(done, 2, "would be written", "free", small_disk)
    assert os.listdir(small_disk) == []


def test_a_full_disk_keeps_what_was_decoded(slow_model, small_disk, tmp_path):
    process = start(slow_model, small_disk / "a.h5", tmp_path, n=4000)
    wait_for_tokens(small_disk / "a.h5.part", process)
    try:  # another program takes the rest
        (small_disk / "filler").write_bytes(b"\0" * (9 << 20))
    except OSError:
        pass
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 3, errors
    assert "No space left" in errors and "kvreplay recover" in errors, errors
    assert not (small_disk / "a.h5").exists()
    done = kvreplay("recover", small_disk / "a.h5.part", tmp_path / "a.h5")
    assert done.returncode == 0, done.stderr
    assert_verified(tmp_path / "a.h5")


def start(model, out, folder, n=100000):
    return subprocess.Popen([KVCAPTURE, "--model", str(model), "--tokens", str(ids_file(folder, [1, 2, 3])),
                             "--max-new-tokens", str(n), "--out", str(out), "--quiet", "--threads", "1"],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_tokens(part, process):
    """Until the file, as another process sees it, holds decode tokens."""
    for _ in range(1200):
        assert process.poll() is None, process.communicate()
        done = kvreplay("info", "--json", part)
        if done.returncode == 0 and json.loads(done.stdout)["n_tokens"] > 3:
            return
        time.sleep(0.05)
    raise AssertionError("no token was committed")


def test_a_killed_capture_can_be_recovered(slow_model, tmp_path):
    out = tmp_path / "a.h5"
    process = start(slow_model, out, tmp_path)
    wait_for_tokens(tmp_path / "a.h5.part", process)
    process.kill()
    process.communicate()
    assert not out.exists()
    done = kvreplay("recover", tmp_path / "a.h5.part", out)
    assert done.returncode == 0, done.stderr
    assert_verified(out, proved=False)
    trace = kvtrace.open(str(out))
    n = len(trace.token_ids)
    assert n > 3 and trace.prompt_len == 3
    # What is there is what an uninterrupted capture of these tokens holds.
    whole = captured(slow_model, tmp_path / "b.h5", ids=[1, 2, 3], n=min(n - 3, 200))
    m = len(whole.token_ids)
    assert list(whole.token_ids) == list(trace.token_ids[:m])
    for layer in range(N_LAYERS):
        assert np.array_equal(np.asarray(whole.k(layer)), np.asarray(trace.k(layer))[:, :m])
        assert np.array_equal(np.asarray(whole.q(layer)), np.asarray(trace.q(layer))[:, :m])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_capture_keeps_its_tokens(slow_model, tmp_path, number):
    process = start(slow_model, tmp_path / "a.h5", tmp_path)
    wait_for_tokens(tmp_path / "a.h5.part", process)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert output == ""
    said = re.fullmatch(r"kvcapture: interrupted; the first (\d+) of 100003 tokens are in .*a\.h5\.part, of which 'kvreplay "
                        r"recover .*' makes a trace\n", errors)
    assert said, errors
    assert not (tmp_path / "a.h5").exists()
    done = kvreplay("recover", tmp_path / "a.h5.part", tmp_path / "a.h5")
    assert done.returncode == 0, done.stderr
    assert len(kvtrace.open(str(tmp_path / "a.h5")).token_ids) == int(said.group(1))
    assert_verified(tmp_path / "a.h5", proved=False)


def test_help_and_version():
    done = kvcapture("--help")
    assert done.returncode == 0 and done.stderr == ""
    for name in ("--model", "--teacher-forced", "--queries", "--dry-run", "--config"):
        assert name in done.stdout
    assert re.match(r"kvcapture \d+\.\d+\.\d+ \(", kvcapture("--version").stdout)
    assert_refused(kvcapture(), 2, "--model", "--help")
    assert VOCAB == 48  # the refusals above name it
