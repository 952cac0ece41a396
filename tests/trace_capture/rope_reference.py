"""Prints the reference values of rope_test.cpp: frequencies and attention factors that transformers computes.

python tests/trace_capture/rope_reference.py    (needs torch and transformers; the committed values are of 5.23.0)
"""
import json

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 4096}

# name, rope_theta, scaling, head_dim, max_position_embeddings, length of the sequence
CASES = [
    ("default", 5e5, {"rope_type": "default"}, 128, 8192, 0),
    ("linear", 1e4, {"rope_type": "linear", "factor": 2.5}, 64, 4096, 0),
    ("dynamic, within the context", 1e4, {"rope_type": "dynamic", "factor": 4.0}, 64, 2048, 2048),
    ("dynamic, one beyond the context", 1e4, {"rope_type": "dynamic", "factor": 4.0}, 64, 2048, 2049),
    ("dynamic, far beyond the context", 1e4, {"rope_type": "dynamic", "factor": 4.0}, 64, 2048, 5000),
    ("llama3 of Llama 3.1", 5e5, LLAMA3 | {"factor": 8.0}, 128, 131072, 0),
    ("llama3 of Llama 3.2 1B", 5e5, LLAMA3 | {"factor": 32.0}, 64, 131072, 0),
    ("yarn of Qwen 2.5", 1e6, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}, 128,
     32768, 0),
    ("yarn, every number given", 1e4, YARN | {"factor": 40.0, "beta_fast": 16.0, "beta_slow": 2.0, "mscale": 1.0,
                                              "mscale_all_dim": 0.707, "truncate": False}, 64, 163840, 0),
    ("yarn, mscale alone", 1e4, YARN | {"factor": 40.0, "mscale": 0.5}, 64, 163840, 0),
    ("yarn, attention factor given", 150000.0, YARN | {"factor": 32.0, "attention_factor": 1.25}, 64, 131072, 0),
    ("yarn, a step for a ramp", 1e4, {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}, 16,
     32, 0),
    ("yarn, a ramp that begins beyond the head", 100.0, YARN | {"factor": 4.0, "beta_slow": 0.25}, 32, 16384, 0),
    ("yarn, factor from the lengths", 1e4, YARN | {"factor": None}, 64, 16384, 0),
]


def main():
    for name, theta, scaling, head_dim, positions, n_tokens in CASES:
        config = LlamaConfig(hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim,
                             max_position_embeddings=positions,
                             rope_parameters={**scaling, "rope_theta": theta})
        rope = LlamaRotaryEmbedding(config)
        if n_tokens:
            rope(torch.zeros(1), torch.arange(n_tokens)[None])
        half = head_dim // 2
        chosen = sorted({0, 1, half // 4, half // 2 - 3, half // 2, half // 2 + 5, half * 3 // 4, half - 1} &
                        set(range(half)))
        values = ", ".join(f"{{{i}, {rope.inv_freq[i].item():.9g}}}" for i in chosen)
        print(f'    {{"{name}", {theta!r}, R"({json.dumps(scaling)})", {head_dim}, {positions}, {n_tokens}, '
              f'{rope.attention_scaling:.9g}, {{{values}}}}},')


if __name__ == "__main__":
    main()
