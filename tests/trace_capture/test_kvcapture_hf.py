"""What kvcapture_hf records of small random models is what hooks on their projections see, and what verify proves."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "traces" / "python"), str(ROOT / "trace_capture" / "python")]
import kvcapture_hf  # noqa: E402
import kvtrace  # noqa: E402
from kvcapture_hf import CaptureError, capture  # noqa: E402

KVREPLAY = os.environ.get("KVREPLAY_BINARY")
PROMPT, NEW, ROOM = 30, 20, 64
COMMON = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)
MODELS = {
    "llama": ("Llama", {}),
    "llama3": ("Llama", {"rope_scaling": LLAMA3}),
    "yarn": ("Llama", {"rope_scaling": YARN}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "mistral": ("Mistral", {"sliding_window": 16}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 16, "attn_logit_softcapping": 2.0}),
    "glm": ("Glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 256}),
}


def model_of(name):
    family, more = MODELS[name]
    head = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    torch.manual_seed(3)
    config = getattr(transformers, family + "Config")(**({**COMMON, **more} if family != "GPT2" else
                                                       {**more, "vocab_size": 97, "bos_token_id": 1, "eos_token_id": 2}))
    return getattr(transformers, family + head)(config).eval()


@pytest.fixture(scope="module")
def llama():
    return model_of("llama")


@pytest.fixture(scope="module")
def prompt():
    return torch.randint(3, 97, (1, PROMPT), generator=torch.Generator().manual_seed(4))


def generate(model, prompt, **more):
    arguments = dict(max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **{**arguments, **more})


def verify(path, n_layers=3):
    if KVREPLAY:
        done = subprocess.run([KVREPLAY, "verify", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count("proved") == n_layers, done.stdout


def projected(model, ids):
    """What comes out of the norms (or projections) of q, k and v of each layer: {(layer, kind): [heads, n, channels]}."""
    found, hooks = {}, []

    def keep(layer, kind, width):
        def hook(module, inputs, output):
            heads = output.detach().reshape(ids.shape[1], -1, width)
            found[layer, kind] = heads.transpose(0, 1).double().numpy()
        return hook

    for module in model.modules():
        if hasattr(module, "q_proj"):
            for kind in "qkv":
                at = getattr(module, f"{kind}_norm", None) or getattr(module, f"{kind}_proj")
                hooks.append(at.register_forward_hook(keep(module.layer_idx, kind, module.head_dim)))
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0]
    for hook in hooks:
        hook.remove()
    return found, logits.double().log_softmax(-1)


def unrotated(rows, rope, positions):
    """Takes back what the trace says was done to q and k. rows: [heads, n, channels]"""
    rows, dim = rows.astype(np.float64), int(rope["rotary_dim"])
    pairs = (slice(0, dim // 2), slice(dim // 2, dim)) if rope["style"] == "half" else (slice(0, dim, 2), slice(1, dim, 2))
    angle = np.asarray(positions)[:, None] * np.asarray(rope["inv_freq"])[None]
    a, b = rows[..., pairs[0]] / rope["attention_factor"], rows[..., pairs[1]] / rope["attention_factor"]
    out = rows.copy()
    out[..., pairs[0]], out[..., pairs[1]] = a * np.cos(angle) + b * np.sin(angle), b * np.cos(angle) - a * np.sin(angle)
    return out


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", MODELS)
def test_a_trace_is_what_the_projections_gave(tmp_path, prompt, name, cache):
    model, path = model_of(name), tmp_path / "t.h5"
    implementation = model.config._attn_implementation
    if name == "gemma2":
        model.set_attn_implementation("eager")  # which caps logits, as the capture does
        implementation = "eager"
    more = {} if cache == "dynamic" else {"cache_implementation": "static", "disable_compile": True}
    plain = generate(model, prompt, **more)
    with capture(model, path, max_tokens=ROOM) as recorded:
        output = generate(model, prompt, **more)
    assert torch.equal(output, plain)
    assert recorded.n_tokens == PROMPT + NEW - 1
    assert model.config._attn_implementation == implementation
    assert not model._forward_hooks and not model._forward_pre_hooks and not kvcapture_hf._recording
    verify(path)

    found, logprobs = projected(model, output[:, :-1])
    with kvtrace.open(path) as trace:
        assert trace.token_ids.tolist() == output[0, :-1].tolist()
        assert (trace.prompt_len, trace.layers, trace.element()) == (PROMPT, [0, 1, 2], "f32")
        for (layer, kind), expected in found.items():
            rows = getattr(trace, kind)(layer)
            if kind != "v" and trace.rope is not None:
                rows = unrotated(rows, trace.rope, trace.positions)
            assert np.abs(rows - expected).max() < 1e-4 * expected.std() + 1e-5, (layer, kind)
        assert len(found) == (0 if name == "gpt2" else 9)
        known = trace.file["tokens/logprob"][:trace.n_tokens]
        assert np.isnan(known[:PROMPT]).all()  # generate() asks for no logits of the prompt but the last
        expected = logprobs[np.arange(PROMPT - 1, PROMPT + NEW - 2), output[0, PROMPT:-1]]
        assert np.abs(known[PROMPT:] - expected.numpy()).max() < 1e-4
        model_attributes = trace.model
        windows = {"mistral": [16] * 3, "gemma2": [16, 0, 16]}.get(name, [0] * 3)
        assert list(model_attributes["sliding_window"]) == windows
        assert bool(model_attributes["qk_norm"]) == (name == "qwen3")
        assert model_attributes["logit_softcap"] == (2.0 if name == "gemma2" else 0)
        if name == "gpt2":
            assert trace.rope is None
        else:
            assert trace.rope["style"] == ("interleaved" if name == "glm" else "half")
            assert trace.rope["invertible"] == 1
            assert (trace.rope["attention_factor"] > 1) == (name == "yarn")


def test_bfloat16_and_options(tmp_path, prompt):
    model, path = model_of("llama").to(torch.bfloat16), tmp_path / "t.h5"
    with capture(model, path, max_tokens=ROOM, queries="window:4", layers=[2, 0], check_steps=5, dtype=None,
                 spans={"needle": (3, 9)}, provenance="random weights"):
        output = generate(model, prompt)
    verify(path, n_layers=2)
    with kvtrace.open(path) as trace:
        assert (trace.element(), trace.layers) == ("bf16", [0, 2])
        assert trace.q_index(0)[0] == PROMPT - 4
        assert trace.file["tokens/spans/begin"][:].tolist() == [3]
        assert trace.file["layers/000/out_index"][:].tolist() == [29, 37, 46, 54, 63]  # those past the end never came
        assert b"random weights" in np.asarray(trace.file.attrs["provenance"]).tobytes() or \
            trace.file.attrs["provenance"] == "random weights"
        keys = trace.k(2)
    with capture(model, path, max_tokens=ROOM, dtype="f32", check_steps=0) as recorded:
        assert torch.equal(generate(model, prompt), output)
    with kvtrace.open(path) as trace:
        assert np.array_equal(trace.k(2), keys)  # widening is exact
        assert "out" not in trace.file["layers/000"]
        assert recorded.n_tokens == trace.n_tokens


def test_passes_without_generate(tmp_path, llama, prompt):
    """A prompt in two pieces, and then a recorded text: every logprob but the first is known."""
    path = tmp_path / "t.h5"
    with capture(llama, path, max_tokens=PROMPT, prompt_len=20), torch.no_grad():
        past = llama(prompt[:, :12], use_cache=True).past_key_values
        past = llama(input_ids=prompt[:, 12:20], past_key_values=past).past_key_values
        llama(input_ids=prompt[:, 20:], past_key_values=past)
    verify(path)
    _, logprobs = projected(llama, prompt)
    with kvtrace.open(path) as trace:
        assert (trace.n_tokens, trace.prompt_len) == (PROMPT, 20)
        known = trace.file["tokens/logprob"][:]
        assert np.isnan(known[0])
        expected = logprobs[np.arange(PROMPT - 1), prompt[0, 1:]].numpy()
        assert np.abs(known[1:] - expected).max() < 1e-4


class StopAt(transformers.LogitsProcessor):
    def __init__(self, n, error):
        self.n, self.error = n, error

    def __call__(self, ids, scores):
        if ids.shape[1] >= self.n:
            raise self.error
        return scores


@pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
def test_an_error_in_the_block_keeps_what_was_recorded(tmp_path, llama, prompt, error):
    path = tmp_path / "t.h5"
    with pytest.raises(type(error)):
        with capture(llama, path, max_tokens=ROOM):
            generate(llama, prompt, logits_processor=[StopAt(PROMPT + 7, error)])
    verify(path)
    assert kvtrace.open(path).n_tokens == PROMPT + 7
    assert llama.config._attn_implementation == "sdpa"


def test_too_little_room_keeps_what_fits(tmp_path, llama, prompt):
    path = tmp_path / "t.h5"
    with pytest.raises(CaptureError, match="token 40 has no room in a trace of max_tokens=40"):
        with capture(llama, path, max_tokens=40):
            generate(llama, prompt)
    assert kvtrace.open(path).n_tokens == 40
    with pytest.raises(CaptureError, match="token 29 has no room"):
        with capture(llama, tmp_path / "none.h5", max_tokens=20):
            generate(llama, prompt)
    assert [p.name for p in tmp_path.iterdir()] == ["t.h5"]


@pytest.mark.parametrize("use,words", [
    (lambda m, p: generate(m, p.repeat(2, 1)), r"shape \(2, 30\), but a trace holds one sequence"),
    (lambda m, p: generate(m, p, num_beams=2), "no beams"),
    (lambda m, p: generate(m, p, use_cache=False), "use_cache=True"),
    (lambda m, p: m(inputs_embeds=m.get_input_embeddings()(p)), "called with embeddings"),
    (lambda m, p: m(input_ids=p, attention_mask=(torch.arange(PROMPT) > 3).long().unsqueeze(0)), "hides tokens"),
    (lambda m, p: m(input_ids=p, position_ids=torch.arange(5, PROMPT + 5).unsqueeze(0)), "position_ids begin at 5"),
    (lambda m, p: m.model(input_ids=p), "outside a pass of the model"),
    (lambda m, p: None, "was not called inside the block"),
])
def test_what_a_trace_cannot_hold_is_refused(tmp_path, llama, prompt, use, words):
    with pytest.raises(CaptureError, match=words):
        with capture(llama, tmp_path / "t.h5", max_tokens=ROOM), torch.no_grad():
            use(llama, prompt)
    assert llama.config._attn_implementation == "sdpa"
    assert torch.isfinite(llama(prompt).logits).all()


def test_a_second_sequence_and_a_cut_cache_are_refused(tmp_path, llama, prompt):
    path = tmp_path / "t.h5"
    with pytest.raises(CaptureError, match="a second sequence begins after 49 tokens"):
        with capture(llama, path, max_tokens=ROOM):
            generate(llama, prompt)
            generate(llama, prompt)
    assert kvtrace.open(path).n_tokens == 49  # the first is whole
    path = tmp_path / "cut.h5"
    with pytest.raises(CaptureError, match="assisted decoding"):
        with capture(llama, path, max_tokens=ROOM), torch.no_grad():
            past = llama(prompt, use_cache=True).past_key_values
            past.crop(-10)
            llama(input_ids=prompt[:, :1], past_key_values=past)
    assert not path.exists()  # its end is not what the model kept


@pytest.mark.parametrize("options,words", [
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"check_steps": -1}, "check_steps is -1"),
    ({"dtype": "fp8"}, "dtype 'fp8' cannot be stored; allowed are f16, bf16 and f32"),
    ({"layers": [0, 9]}, "layer 9 cannot be recorded; the layers that can are 0, 1, 2"),
    ({"queries": "decoding"}, "the nearest is decode"),
    ({"spans": {"needle": (3, 99)}}, "spans\\[0\\].end is 99"),
    ({"rope": {"style": "half", "inv_freq": [1.0]}, "prompt_len": 65}, "prompt_len is 65"),
])
def test_options_that_cannot_be_are_refused(tmp_path, llama, prompt, options, words):
    with pytest.raises(CaptureError, match=words):
        with capture(llama, tmp_path / "t.h5", **{"max_tokens": ROOM, **options}):
            generate(llama, prompt)
    assert not list(tmp_path.iterdir())


def test_models_that_cannot_be_captured_are_refused(tmp_path, prompt):
    path = tmp_path / "t.h5"
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=97, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)).eval()
    with pytest.raises(CaptureError, match="encoder-decoder"):
        capture(t5, path, max_tokens=ROOM).__enter__()
    training = model_of("llama").train()
    with pytest.raises(CaptureError, match="model.eval"):
        capture(training, path, max_tokens=ROOM).__enter__()
    with pytest.raises(CaptureError, match="before torch.compile"):
        capture(torch.compile(model_of("llama")), path, max_tokens=ROOM).__enter__()
    sinks = transformers.GptOssForCausalLM(transformers.GptOssConfig(**COMMON, head_dim=16)).eval()
    with pytest.raises(CaptureError, match="does not run with sdpa attention"):
        capture(sinks, path, max_tokens=ROOM).__enter__()
    torch.manual_seed(0)
    mixed = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(
        **{**COMMON, "num_hidden_layers": 6}, head_dim=16, sliding_window=16)).eval()
    with pytest.raises(CaptureError, match="several rotations"):
        with capture(mixed, path, max_tokens=ROOM):
            generate(mixed, prompt)
    sliding = [i for i, kind in enumerate(mixed.config.layer_types) if kind == "sliding_attention"]
    local = getattr(mixed.model, "rotary_emb_local", None)  # transformers 4 has a module for each, and cannot choose
    rope = {} if local is None else {"rope": {"style": "half", "inv_freq": local.inv_freq.tolist()}}
    with capture(mixed, path, max_tokens=ROOM, layers=sliding, **rope):
        generate(mixed, prompt)
    verify(path, n_layers=len(sliding))


def test_a_model_that_hooking_changes_is_refused(tmp_path, prompt):
    model = model_of("llama")
    forward, calls = model.forward, []

    def unsteady(*args, **kwargs):
        calls.append(1)
        output = forward(*args, **kwargs)
        output.logits = output.logits + 0.01 * len(calls)
        return output

    model.forward = unsteady
    with pytest.raises(CaptureError, match="logits that differ from plain sdpa by up to 0.03"):
        capture(model, tmp_path / "t.h5", max_tokens=ROOM).__enter__()
    assert model.config._attn_implementation == "sdpa" and not kvcapture_hf._recording


def test_two_captures_of_one_model_at_once_are_refused(tmp_path, llama, prompt):
    with capture(llama, tmp_path / "a.h5", max_tokens=ROOM):
        with pytest.raises(CaptureError, match="captured already"):
            capture(llama, tmp_path / "b.h5", max_tokens=ROOM).__enter__()
        generate(llama, prompt)
    verify(tmp_path / "a.h5")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_on_a_device(tmp_path, prompt, dtype):
    model, path = model_of("qwen3").to("cuda", dtype), tmp_path / "t.h5"
    with capture(model, path, max_tokens=ROOM):
        output = generate(model, prompt.cuda())
    verify(path)
    with kvtrace.open(path) as trace:
        assert trace.token_ids.tolist() == output[0, :-1].tolist()
