"""The command under test, $KVCAPTURE_BINARY, and small model folders out of random numbers."""
import json
import os
import pathlib
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "cli"), str(ROOT / "traces" / "python")]
import kvtrace  # noqa: E402
from harness import kvreplay  # noqa: E402

KVCAPTURE = os.environ.get("KVCAPTURE_BINARY", str(ROOT / "build" / "release" / "trace_capture" / "kvcapture"))
FINEWEB = ROOT / "traces" / "samples" / "fineweb-llama-3m"

VOCAB, N_LAYERS, HIDDEN, N_HEADS, N_KV_HEADS, HEAD_DIM, CONTEXT = 48, 3, 32, 4, 2, 8, 96


def kvcapture(*arguments, timeout=300, **more):
    return subprocess.run([KVCAPTURE, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, **more)


def read_safetensors(path):
    """{name: float32 array} of a file of F32 tensors."""
    data = pathlib.Path(path).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8:8 + size])
    header.pop("__metadata__", None)
    return {name: np.frombuffer(data[8 + size + t["data_offsets"][0]:8 + size + t["data_offsets"][1]], "<f4")
            .reshape(t["shape"]) for name, t in header.items()}


def write_safetensors(path, tensors):
    header, data = {}, b""
    for name, array in tensors.items():
        raw = np.ascontiguousarray(array, "<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    pathlib.Path(path).write_bytes(len(text).to_bytes(8, "little") + text + data)


def make_model(folder, vocab=VOCAB, scale_v=1.0, scale_logits=1.0, seed=1, **config):
    """A Llama of random weights."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    inner = 40

    def weight(*shape):
        return rng.standard_normal(shape) / np.sqrt(shape[-1])

    tensors = {"model.embed_tokens.weight": rng.standard_normal((vocab, HIDDEN)),
               "model.norm.weight": np.full(HIDDEN, scale_logits)}
    for layer in range(N_LAYERS):
        at = f"model.layers.{layer}."
        tensors |= {
            at + "input_layernorm.weight": np.ones(HIDDEN),
            at + "post_attention_layernorm.weight": np.ones(HIDDEN),
            at + "self_attn.q_proj.weight": 2 * weight(N_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.k_proj.weight": 2 * weight(N_KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.v_proj.weight": scale_v * weight(N_KV_HEADS * HEAD_DIM, HIDDEN),
            at + "self_attn.o_proj.weight": weight(HIDDEN, N_HEADS * HEAD_DIM),
            at + "mlp.gate_proj.weight": weight(inner, HIDDEN),
            at + "mlp.up_proj.weight": weight(inner, HIDDEN),
            at + "mlp.down_proj.weight": weight(HIDDEN, inner),
        }
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
        "intermediate_size": inner, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEADS,
        "num_key_value_heads": N_KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": vocab,
        "max_position_embeddings": CONTEXT, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": None, **config}))
    return folder


def assert_refused(done, code, *words):
    """One sentence on stderr that starts with the program's name and says these words; nothing on stdout."""
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == "", done.stdout
    lines = done.stderr.strip().split("\n")
    lines = [line for line in lines if " to write, " not in line]  # the estimate, which comes before the first step
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("kvcapture: "), done.stderr
    for word in words:
        assert str(word) in lines[0], (word, done.stderr)


def assert_verified(trace, proved=True):
    done = kvreplay("verify", trace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not proved or "proved" in done.stdout, done.stdout
    return done.stdout
