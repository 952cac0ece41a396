"""The measurements of capture_bench for transformers with forward hooks that copy q, k and v to the host.

hf_capture.py [--layers N] [--prompt N] [--steps N] builds a random bfloat16 Llama of Llama-3.1-8B shapes on the GPU and
prints prefill and decode times with and without the hooks. Needs torch with CUDA and transformers; exits 77 without.
"""
import argparse
import sys
import time

try:
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
except ImportError as error:
    print(f"skipped: {error}")
    sys.exit(77)


def hook_projections(model, kept):
    """What people write: each projection's output, copied to the host in every forward pass."""
    handles = []
    for layer in model.model.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            handles.append(projection.register_forward_hook(lambda module, args, out: kept.append(out.detach().cpu())))
    return handles


@torch.inference_mode()
def measure(model, ids, steps):
    cache = DynamicCache()
    torch.cuda.synchronize()
    start = time.perf_counter()
    next_id = model(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    prefill = time.perf_counter() - start
    start = time.perf_counter()
    for _ in range(steps):
        next_id = model(next_id, past_key_values=cache).logits[:, -1:].argmax(-1)
        next_id.item()
    return prefill, (time.perf_counter() - start) / steps


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=256)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("skipped: no CUDA device")
        return 77
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=args.layers,
                         num_attention_heads=32, num_key_value_heads=8, vocab_size=128256,
                         max_position_embeddings=131072, rope_theta=500000.0)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval()
    ids = (torch.arange(args.prompt, device="cuda") * 7919 % config.vocab_size)[None]
    measure(model, ids, 8)
    prefill, step = measure(model, ids, args.steps)
    kept = []
    handles = hook_projections(model, kept)
    hooked_prefill, hooked_step = measure(model, ids, args.steps)
    for handle in handles:
        handle.remove()
    size = sum(rows.numel() * rows.element_size() for rows in kept)
    print(f"{'transformers: decode step without hooks, ms':<58}{step * 1e3:>16.2f}")
    print(f"{'transformers: decode step with hooks, ms':<58}{hooked_step * 1e3:>16.2f}")
    print(f"{'  decode speed with hooks / without':<58}{step / hooked_step:>16.3f}")
    print(f"{'transformers: prefill without hooks, s':<58}{prefill:>16.3f}")
    print(f"{'transformers: prefill with hooks (host memory only), s':<58}{hooked_prefill:>16.3f}")
    print(f"{'  copied, GB':<58}{size / 1e9:>16.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
