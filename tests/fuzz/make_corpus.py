"""Writes the seeds of the corpora: make_corpus.py KVREPLAY [FOLDER] (default: corpus beside this file); needs h5py.

What fuzzing found is kept beside them under other names; this script touches only what it makes.
"""
import io
import json
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent

METHODS = """full
h2o
h2o:window=50%
h2o:window=128+adakv+moments
snapkv:budget=2048/momentum:alpha=0.97
snapkv:budget=25%+pyramid/full
streaming+kivi:bits=2
full+quest:page=16
momentkv
moment-kv
h2o:sink=4,window=32,scope=query_head,pool=decode,interval=8
h2o:alpha=@file.json
given:scores=magic
a,b:x=1,y=2,c
h2o+adakv+cam+mean
64KiB
25%
0.25
128""".splitlines()

PLANS = ["""
traces = ["traces/*.h5"]
methods = ["h2o", "snapkv:budget=2048/momentum:alpha=0.97"]
budgets = [128, "25%", "64KiB"]
compensators = ["mean", "moments"]
metrics = "error_output,evicted_mass"
statistics = ["mean", "p99"]
layers = ["0-2", 5]
detail = ["outputs", "heads"]
output_steps = [1, 2]
prompt_len = 4
max_steps = 100
checkpoints = 8
seed = 7
""", """
traces = "a.h5"
budgets = 128
[[method]]
text = "h2o"
budgets = [64]
grid = {sink = [0, 4], window = {from = 16, to = 64, step = 16}}
zip = [{a = [1, 2], b = {from = 0.1, to = 1, count = 2, scale = "log"}}]
[[method]]
text = "momentum"
[method.grid]
alpha = {from = 0.9, to = 0.999, random = 5, seed = 3, scale = "one_minus"}
[method.zip]
x = [true, "text", 1.5, -3]
"""]

CONFIGS = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
              "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
              "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": [2, 3], "tie_word_embeddings": True,
              "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                               "original_max_position_embeddings": 8192}, "rope_theta": 500000.0},
    "mistral": {"architectures": ["MistralForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
                "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 100, "sliding_window": 16,
                "rope_scaling": {"type": "linear", "factor": 2}},
    "qwen2": {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
              "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100, "use_sliding_window": True,
              "sliding_window": 8, "max_window_layers": 1,
              "rope_parameters": {"rope_type": "yarn", "factor": None, "beta_fast": 32, "beta_slow": 1,
                                  "mscale": 1, "original_max_position_embeddings": 64, "truncate": False}},
    "qwen3": {"model_type": "qwen3", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
              "num_attention_heads": 32, "vocab_size": 100, "head_dim": 16, "attention_bias": True,
              "use_sliding_window": True, "sliding_window": 9, "layer_types": ["full_attention", "sliding_attention"],
              "rope_scaling": {"rope_type": "dynamic", "factor": 4}},
}


def tokenizer(**parts):
    """Byte-level BPE over a few letters."""
    letters = {token: i for i, token in enumerate(["H", "e", "l", "o", "w", "r", "d", "Ġ", "1", "2", "3", "ll", "llo",
                                                    "<unk>", "<0x0A>", "\u2581", "Ċ"])}
    return {"version": "1.0", "added_tokens": [{"id": len(letters), "content": "<s>", "special": True, "lstrip": True}],
            "normalizer": None, "pre_tokenizer": None, "post_processor": None, "decoder": None,
            "model": {"type": "BPE", "vocab": letters, "merges": ["l l", "ll o"]}, **parts}


def sequence(kind, *steps):
    return {"type": "Sequence", kind: list(steps)}


def tokenizers():
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s+(?!\S)|\s+"},
             "behavior": "Isolated", "invert": False}
    template = {"type": "TemplateProcessing",
                "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
                "special_tokens": {"<s>": {"id": "<s>", "ids": [17], "tokens": ["<s>"]}}}
    yield "plain", tokenizer()
    yield "gpt2", tokenizer(pre_tokenizer={"type": "ByteLevel", "add_prefix_space": True}, decoder={"type": "ByteLevel"})
    yield "llama3", tokenizer(pre_tokenizer=sequence("pretokenizers", split, byte_level), decoder=byte_level,
                              post_processor=sequence("processors", byte_level, template))
    yield "llama2", tokenizer(
        normalizer=sequence("normalizers", {"type": "Prepend", "prepend": "\u2581"},
                            {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}),
        decoder=sequence("decoders", {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                         {"type": "ByteFallback"}, {"type": "Fuse"},
                         {"type": "Strip", "content": " ", "start": 1, "stop": 0}))
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
    yield "metaspace", tokenizer(pre_tokenizer=metaspace, decoder=metaspace)
    yield "qwen2", tokenizer(normalizer={"type": "NFC"}, pre_tokenizer=sequence(
        "pretokenizers", {"type": "Digits", "individual_digits": True},
        {"type": "Split", "pattern": {"String": "l"}, "behavior": "MergedWithNext", "invert": True}, byte_level))


def npz(arrays):
    """A zip archive of (name, descr, shape, data), deflated where the name starts with d."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, descr, shape, data in arrays:
            header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
            info = zipfile.ZipInfo(name + ".npy")
            info.compress_type = zipfile.ZIP_DEFLATED if name[0] in "kv" else zipfile.ZIP_STORED
            archive.writestr(info, b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data)
    return out.getvalue()


def trace(compressed):
    """The smallest trace that h5py writes from the ten lines of docs/trace_format.md."""
    import h5py
    import numpy as np
    out = io.BytesIO()
    with h5py.File(out, "w", libver=("v108", "v110"), meta_block_size=512) as f:
        f.attrs.update(format="kvtrace", format_version="1.0")
        f.create_group("model").attrs.update(name="m", n_layers=1, n_heads=2, n_kv_heads=1, head_dim=2, v_head_dim=2,
                                             attention_scale=0.5, logit_softcap=0.0, sliding_window=np.zeros(1, "i4"))
        f["tokens/id"], f["tokens/position"] = np.arange(4, dtype="i4"), np.arange(4, dtype="i4")
        f["tokens/phase"] = np.array([0, 0, 1, 1], dtype="u1")
        f["n_valid"] = np.uint64(4)
        filters = {"chunks": (1, 2, 2), "compression": "gzip", "shuffle": True} if compressed else {}
        for name, heads in (("q", 2), ("k", 1), ("v", 1)):
            f.create_dataset(f"layers/000/{name}", data=np.ones((heads, 4, 2), "f4"), **filters)
    return out.getvalue()


def every_part(program):
    """Each part with all of its keys at their defaults, and each preset, as `kvreplay policies --json` lists them."""
    known = json.loads(subprocess.run([program, "policies", "--json"], check=True, capture_output=True).stdout)
    for part in known["parts"]:
        keys = [f"{key['name']}={str(key['default']).lower()}" for key in part["keys"] if key.get("default") not in (None, "")]
        text = part["name"] + (":" + ",".join(keys) if keys else "")
        yield part["name"], text if part["role"] == "select" else "h2o+" + text
    for preset in known.get("presets", []):
        yield preset["name"], preset["name"]


def seeds(program):
    for name, text in every_part(program):
        yield f"method/{name}", text.encode()
    for i, text in enumerate(METHODS):
        yield f"method/{i:02}", text.encode()
    for i, text in enumerate(PLANS):
        yield f"plan/{i}.toml", text.lstrip().encode()
    for name, config in CONFIGS.items():
        yield f"config/{name}.json", json.dumps(config).encode()
    for name, file in tokenizers():
        yield f"tokenizer/{name}.json", json.dumps(file, ensure_ascii=False).encode()
    yield "tokenizer/text", json.dumps(tokenizer()).encode() + "\0Hello\nwörld <s> 1234".encode()

    one = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    two = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
    for name, header in (("two", {"a": one, "b": two}), ("metadata", {"__metadata__": {"format": "pt"}, "a": one}),
                         ("unaligned", {"a": {**one, "data_offsets": [1, 25]}}), ("overlap", {"a": one, "b": one}),
                         ("outside", {"a": {**one, "data_offsets": [24, 48]}}), ("empty", {"e": {**two, "shape": [0],
                          "data_offsets": [8, 8]}})):
        yield f"safetensors/{name}", b"\x04" + json.dumps(header).encode()
    framed = json.dumps({"a": one, "b": two}).encode()
    yield "safetensors/bytes", b"\0" + struct.pack("<Q", len(framed)) + framed + bytes(32)

    ids, row = struct.pack("<3i", 5, 6, 7), bytes(range(24))
    good = [("token_ids", "<i4", (3,), ids)] + [(name, "<f4", (1, 3, 2), row) for name in ("k0", "v0", "q0")]
    yield "npz/good", b"\0" + npz(good)
    yield "npz/out", b"\0" + npz(good + [("out_index", "<i4", (1,), ids[:4].replace(b"\5", b"\2")),
                                          ("out0", "<f4", (1, 1, 2), row[:8]), ("w_o0", "<f4", (3, 2), row)])
    # Numbers that make the target put an archive together: kind, type, n_tokens, heads, width, odd, seed, ...
    piece = lambda kind: bytes([kind, 0, 2, 0, 1, 0, 0, 0, 0, 1])
    yield "npz/made", b"\1" + b"".join(piece(kind) for kind in (0, 1, 2, 3))
    yield "npz/made_more", b"\x29" + b"".join(piece(kind) for kind in (0, 1, 2, 3, 4, 8, 9, 10, 11))

    yield "trace/right", b"\0\1"
    yield "trace/oldest", b"\1\1"
    for kind in range(14):
        yield f"trace/change_{kind:02}", bytes([kind % 2, 0]) + b"".join(
            bytes([item, kind, 2 + kind, 3, 1, 2, 1]) for item in range(3 * kind, 3 * kind + 3))
    for name in ("contiguous", "compressed"):
        yield f"trace_bytes/{name}.h5", trace(name == "compressed")
    yield "stored_array/zeros", bytes(64)
    yield "stored_array/contiguous", bytes([2, 1, 4, 0, 3, 0, 8, 100, 1, 4, 0] * 4)
    yield "stored_array/chunked", bytes([2, 1, 4, 0, 3, 1, 0, 0, 1, 4, 4, 9, 64, 1, 4, 0] * 8)


def main():
    folder = Path(sys.argv[2]) if len(sys.argv) > 2 else HERE / "corpus"
    for name, data in seeds(sys.argv[1]):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


if __name__ == "__main__":
    main()
