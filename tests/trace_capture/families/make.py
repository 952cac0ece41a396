"""Small random models of every supported family, and what Hugging Face transformers computes for them in float32.

make.py DIR                        the committed cases (needs torch, transformers, safetensors)
make.py DIR --random N --seed S    N cases with configurations drawn at random

Every case is a model folder, and beside its files a folder `reference`: reference.json with the token ids, the passes
they go in and the tokens (`rows`) whose values are kept, and model.safetensors with, for each layer l,
q.l and out.l [n_heads, rows, head_dim], k.l and v.l [n_kv_heads, rows, head_dim] as they enter and leave attention,
logits [rows, vocab], and logprob [n_tokens - 1] of each next token.
"""
import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ARCHITECTURE = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
                "qwen3": "Qwen3ForCausalLM"}
SHAPES = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
          "rope_theta": 10000.0, "tie_word_embeddings": True, "hidden_act": "silu", "bos_token_id": 1,
          "eos_token_id": 2}


def case(family, dtype="float16", n_tokens=40, passes=None, shards=1, v5_names=False, **config):
    return {"family": family, "dtype": dtype, "n_tokens": n_tokens, "passes": passes or [n_tokens], "shards": shards,
            "v5_names": v5_names, "config": {**SHAPES, **config}}


CASES = {
    "llama_plain": case("llama", dtype="float32", num_key_value_heads=4, tie_word_embeddings=False, num_hidden_layers=1),
    "llama_bias": case("llama", attention_bias=True, mlp_bias=True, num_attention_heads=6, num_key_value_heads=2,
                       hidden_size=48, head_dim=6),
    "llama_linear": case("llama", dtype="bfloat16", rope_scaling={"type": "linear", "factor": 4.0}),
    "llama_dynamic": case("llama", max_position_embeddings=16, passes=[24, 8, 1, 1, 1, 1, 1, 1, 1, 1],
                          rope_scaling={"rope_type": "dynamic", "factor": 2.0}),
    "llama3": case("llama", dtype="bfloat16", shards=2, rope_theta=500000.0, max_position_embeddings=128, head_dim=16,
                   rope_scaling={"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 32}),
    "llama_yarn": case("llama", v5_names=True, rope_scaling={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0,
                                                             "original_max_position_embeddings": 16}),
    "mistral_window": case("mistral", dtype="bfloat16", sliding_window=7, head_dim=16, tie_word_embeddings=False),
    "qwen2_window": case("qwen2", use_sliding_window=True, sliding_window=9, max_window_layers=1, rope_theta=1e6),
    "qwen2_yarn": case("qwen2", num_hidden_layers=1, use_sliding_window=False, num_attention_heads=7, head_dim=8,
                       num_key_value_heads=1, hidden_size=56,
                       rope_scaling={"type": "yarn", "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5,
                                     "beta_fast": 8.0, "original_max_position_embeddings": 16}),
    "qwen3": case("qwen3", dtype="bfloat16", head_dim=16, rope_theta=1e6, v5_names=True),
    "qwen3_sharded": case("qwen3", shards=3, head_dim=12, tie_word_embeddings=False, attention_bias=True,
                          rope_scaling={"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.3, "beta_slow": 2.0,
                                        "truncate": False, "original_max_position_embeddings": 32}),
}


def config_json(spec):
    """config.json as published folders have it: the names of transformers 4, or those of 5."""
    config = {"architectures": [ARCHITECTURE[spec["family"]]], "model_type": spec["family"], **spec["config"]}
    config["torch_dtype"] = spec["dtype"]
    if spec["v5_names"]:
        config["dtype"] = config.pop("torch_dtype")
        config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta"),
                                     **config.pop("rope_scaling", {})}
    return config


def random_weights(model, dtype, rng):
    """Large enough that attention is neither flat nor all on one token; biases and norms away from 0 and 1."""
    tensors = {}
    for name, old in model.state_dict().items():
        shape = tuple(old.shape)
        if name.endswith("norm.weight"):
            values = rng.uniform(0.6, 1.6, shape)
        elif name.endswith("bias"):
            values = rng.normal(0, 0.4, shape)
        elif "embed_tokens" in name or "lm_head" in name:
            values = rng.normal(0, 0.5, shape)
        else:
            values = rng.normal(0, 1.3 / math.sqrt(shape[1]), shape)
        tensors[name] = torch.tensor(values, dtype=getattr(torch, dtype))
    if model.config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def save_weights(folder, tensors, shards):
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, files = sorted(tensors), {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        files.update(dict.fromkeys(part, file))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")


RECORDED = {}  # layer -> list of (q, k, v, out) of each pass; (heads, n, head_dim)


def recording_attention(module, query, key, value, mask, scaling, dropout=0.0, **_):
    """Attention as the formula says it, keeping what entered and left."""
    group_size = query.shape[1] // key.shape[1]
    logits = query @ key.repeat_interleave(group_size, 1).transpose(2, 3) * scaling
    if mask is not None:
        logits = logits + mask
    out = torch.softmax(logits, -1, dtype=torch.float32) @ value.repeat_interleave(group_size, 1)
    n = query.shape[2]
    RECORDED.setdefault(module.layer_idx, []).append((query[0], key[0, :, -n:], value[0, :, -n:], out[0]))
    return out.transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register("recording", recording_attention)
ALL_MASK_ATTENTION_FUNCTIONS.register("recording", eager_mask)


def reference(folder, ids, passes, rows):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="recording").eval()
    RECORDED.clear()
    logits, done, cache = [], 0, DynamicCache()
    with torch.no_grad():
        for n in passes:
            out = model(torch.tensor([ids[done:done + n]]), past_key_values=cache, use_cache=True,
                        position_ids=torch.arange(done, done + n)[None])
            logits.append(out.logits[0])
            done += n
    logits = torch.cat(logits).float()
    tensors = {}
    for layer, parts in RECORDED.items():
        for name, values in zip(("q", "k", "v", "out"), zip(*parts)):
            tensors[f"{name}.{layer}"] = torch.cat(values, 1)[:, rows].contiguous().numpy()
    logprob = torch.log_softmax(logits.double(), -1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    tensors["logits"] = logits[rows].numpy()
    tensors["logprob"] = logprob.float().numpy()
    return tensors


def make(folder, spec, seed):
    rng = np.random.default_rng(seed)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "reference").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_json(spec), indent=1) + "\n")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    save_weights(folder, random_weights(model, spec["dtype"], rng), spec["shards"])
    ids = rng.integers(0, spec["config"]["vocab_size"], spec["n_tokens"]).tolist()
    rows = sorted({0, 1, *range(9, spec["n_tokens"], 10), spec["n_tokens"] - 1})
    kept = {"ids": ids, "passes": spec["passes"], "rows": rows}
    (folder / "reference" / "reference.json").write_text(json.dumps(kept) + "\n")
    save_numpy(reference(folder, ids, spec["passes"], rows), folder / "reference" / "model.safetensors")


def random_case(rng):
    family = str(rng.choice(list(ARCHITECTURE)))
    n_kv_heads, group_size = int(rng.integers(1, 4)), int(rng.integers(1, 6))
    n_tokens = int(rng.integers(20, 90))
    config = {"num_hidden_layers": int(rng.integers(1, 4)), "num_key_value_heads": n_kv_heads,
              "num_attention_heads": n_kv_heads * group_size, "head_dim": 2 * int(rng.integers(2, 20)),
              "hidden_size": n_kv_heads * group_size * int(rng.integers(3, 10)), "intermediate_size": int(rng.integers(16, 120)),
              "vocab_size": int(rng.integers(32, 200)), "rope_theta": float(10 ** rng.uniform(3, 6)),
              "tie_word_embeddings": bool(rng.integers(2)), "rms_norm_eps": float(10 ** rng.uniform(-6, -4))}
    if family in ("llama", "qwen3"):
        config["attention_bias"] = bool(rng.integers(2))
    if family == "llama":
        config["mlp_bias"] = bool(rng.integers(2))
    if family == "mistral":
        config["sliding_window"] = None if rng.integers(2) else int(rng.integers(2, n_tokens + 10))
    if family in ("qwen2", "qwen3"):
        config["use_sliding_window"] = bool(rng.integers(2))
        config["sliding_window"] = int(rng.integers(2, n_tokens + 10))
        config["max_window_layers"] = int(rng.integers(0, 3))
    original = int(rng.integers(8, 64))
    factor = float(rng.uniform(1, 8))
    scaling = [
        {"rope_type": "default"}, {"rope_type": "linear", "factor": factor}, {"rope_type": "dynamic", "factor": factor},
        {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": original},
        {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}]
    config["rope_scaling"] = scaling[int(rng.integers(len(scaling)))]
    config["max_position_embeddings"] = original if config["rope_scaling"]["rope_type"] == "dynamic" else 128
    passes = [n_tokens]
    sliding = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    if not sliding and rng.integers(2):
        first = int(rng.integers(1, n_tokens - 3))
        passes = [first, n_tokens - first - 2, 1, 1]
    return case(family, dtype=str(rng.choice(["float32", "float16", "bfloat16"])), n_tokens=n_tokens, passes=passes,
                shards=int(rng.integers(1, 4)), v5_names=bool(rng.integers(2)), **config)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dir", type=Path)
    parser.add_argument("--random", type=int, default=0, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.random:
        for i in range(args.random):
            spec = random_case(np.random.default_rng([args.seed, i]))
            make(args.dir / f"random_{args.seed}_{i}", spec, [args.seed, i, 1])
    else:
        for number, (name, spec) in enumerate(CASES.items()):
            make(args.dir / name, spec, number)


if __name__ == "__main__":
    main()
