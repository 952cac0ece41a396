"""What kvreplay is measured against: the same replay in PyTorch, written as well as PyTorch allows.

Replays one layer of a trace under h2o or momentum, any number of configurations at once, and reports the mean `error`
and the seconds. Configurations and KV heads are batch dimensions; resident keys and values lie in preallocated slots
where a new token takes the place of the evicted one, so that nothing is compacted; what all configurations share
(exact outputs, the prompt's column mass, attention over a pinned prompt) is computed once, in blocks of steps, as
matrix products. The only Python loops are those over steps and blocks.

Shapes: C configurations, H KV heads, G query heads each, S steps of a block, D head_dim, N slots, T tokens.
"""
import argparse
import json
import sys
import time

import h5py
import numpy as np
import torch

BLOCK = 64
INF = float("inf")


class Layer:
    """One layer, float32: q (H, T, G, D) with the softmax scale folded in, k and v (H, T, D)."""

    def __init__(self, path, layer, n_tokens=None):
        with h5py.File(path, "r") as file:
            group = file[f"layers/{layer:03d}"]
            q, k, v = (torch.from_numpy(group[name][...].astype(np.float32)) for name in "qkv")
            scale = float(file["model"].attrs["attention_scale"])
            phase = file["tokens/phase"][...]
        if q.shape[1] != k.shape[1]:
            raise SystemExit(f"{path}: layer {layer} stores only some queries; this replay needs all of them")
        self.prompt_len = int(np.argmax(phase)) if phase.any() else len(phase)
        self.n_heads, self.n_tokens, self.head_dim = q.shape
        self.n_kv_heads = k.shape[0]
        self.group_size = self.n_heads // self.n_kv_heads
        self.q = (q.view(self.n_kv_heads, self.group_size, self.n_tokens, self.head_dim) * scale).transpose(1, 2).contiguous()
        self.k, self.v = k.contiguous(), v.contiguous()


def blocks(begin, end):
    return ((at, min(at + BLOCK, end)) for at in range(begin, end, BLOCK))


def causal_logits(layer, begin, end):
    """(H, S * G, end): logits of the queries of [begin, end) on all keys before end; later keys are -inf."""
    q = layer.q[:, begin:end].flatten(1, 2)
    logits = torch.bmm(q, layer.k[:, :end].transpose(1, 2))
    steps = torch.arange(begin, end).repeat_interleave(layer.group_size)
    logits[:, :, begin:].masked_fill_(torch.arange(begin, end) > steps[:, None], -INF)
    return logits


def exact_outputs(layer, begin, end):
    """(H, S, G, D): attention outputs of the uncompressed cache."""
    weights = torch.softmax(causal_logits(layer, begin, end), -1)
    return torch.bmm(weights, layer.v[:, :end]).view(layer.n_kv_heads, end - begin, layer.group_size, layer.head_dim)


def prompt_column_mass(layer):
    """(H, prompt_len): attention that each prompt token received from all prompt queries of its group."""
    mass = torch.zeros(layer.n_kv_heads, layer.prompt_len)
    for begin, end in blocks(0, layer.prompt_len):
        mass[:, :end] += torch.softmax(causal_logits(layer, begin, end), -1).sum(1)
    return mass


def prompt_part(layer, begin, end):
    """Attention of a block's queries over the pinned prompt: maximum and sum (H, S, G, 1), weighted values (H, S, G, D)."""
    shape = (layer.n_kv_heads, end - begin, layer.group_size, -1)
    logits = torch.bmm(layer.q[:, begin:end].flatten(1, 2), layer.k[:, :layer.prompt_len].transpose(1, 2))
    top = logits.amax(-1, keepdim=True)
    weights = logits.sub_(top).exp_()
    return (top.view(shape), weights.sum(-1, keepdim=True).view(shape),
            torch.bmm(weights, layer.v[:, :layer.prompt_len]).view(shape))


class Errors:
    """Mean over steps and query heads of ||f - f_R|| / ||f||, for each configuration."""

    def __init__(self, n_configs, layer):
        self.sum = torch.zeros(n_configs, dtype=torch.float64)
        self.count = (layer.n_tokens - layer.prompt_len) * layer.n_heads

    def add(self, exact, outputs):
        """exact (H, S, G, D); outputs (C, H, S, G, D), which is overwritten."""
        difference = outputs.sub_(exact).norm(dim=-1)
        self.sum += (difference / exact.norm(dim=-1)).sum((1, 2, 3), dtype=torch.float64)

    def mean(self):
        return (self.sum / self.count).tolist()


def replay_h2o(layer, budget, windows):
    """One set for each KV head. Score: attention received so far, group summed; the latest `window` tokens stay."""
    n_configs, n_heads, dim = len(windows), layer.n_kv_heads, layer.head_dim
    n_slots = min(budget + 1, layer.n_tokens)
    window = torch.tensor(windows)[:, None, None]
    keys = torch.empty(n_configs, n_heads, n_slots, dim)
    values = torch.empty(n_configs, n_heads, n_slots, dim)
    mass = torch.zeros(n_configs, n_heads, n_slots)
    pos = torch.zeros(n_configs, n_heads, n_slots, dtype=torch.int64)
    scores = torch.empty(n_configs, n_heads, n_slots)
    errors = Errors(n_configs, layer)

    # The cut of the prompt; `filled` slots are in use, and so many are attended.
    prompt_mass = prompt_column_mass(layer).expand(n_configs, -1, -1)
    filled = min(budget, layer.prompt_len)
    latest = torch.arange(layer.prompt_len) >= layer.prompt_len - window
    kept = prompt_mass.masked_fill(latest, INF).topk(filled, sorted=False).indices  # (C, H, filled)
    head = torch.arange(n_heads)[:, None]
    keys[:, :, :filled], values[:, :, :filled] = layer.k[head, kept], layer.v[head, kept]
    mass[:, :, :filled], pos[:, :, :filled] = prompt_mass.gather(2, kept), kept

    flat_keys, flat_values = keys.view(-1, dim), values.view(-1, dim)
    flat_mass, flat_pos = mass.view(-1), pos.view(-1)
    base = (torch.arange(n_configs * n_heads) * n_slots)
    free = None  # flat index of the slot that the last eviction left, for each set
    for begin, end in blocks(layer.prompt_len, layer.n_tokens):
        exact = exact_outputs(layer, begin, end)
        outputs = torch.empty(n_configs, n_heads, end - begin, layer.group_size, dim)
        for t in range(begin, end):
            if filled < n_slots:
                free, filled = base + filled, filled + 1
            flat_keys.index_copy_(0, free, layer.k[:, t].repeat(n_configs, 1))
            flat_values.index_copy_(0, free, layer.v[:, t].repeat(n_configs, 1))
            flat_mass.index_fill_(0, free, 0)
            flat_pos.index_fill_(0, free, t)

            q = layer.q[:, t].repeat(n_configs, 1, 1)  # (C * H, G, D)
            weights = torch.bmm(q, keys[:, :, :filled].flatten(0, 1).transpose(1, 2)).softmax(-1)
            outputs[:, :, t - begin] = torch.bmm(weights, values[:, :, :filled].flatten(0, 1)).view(
                n_configs, n_heads, layer.group_size, dim)
            mass[:, :, :filled] += weights.sum(1).view(n_configs, n_heads, filled)
            if filled > budget:
                scores.copy_(mass).masked_fill_(pos > t - window, INF)
                free = scores.view(-1, n_slots).argmin(-1).add_(base)
        errors.add(exact, outputs)
    return errors.mean()


def replay_momentum(layer, budget, alphas):
    """One set for the layer, over decode tokens; the prompt is pinned. Score: decayed sum of attention, heads averaged."""
    n_configs, n_heads, dim = len(alphas), layer.n_kv_heads, layer.head_dim
    n_slots = min(budget + 1, layer.n_tokens - layer.prompt_len)
    alpha = torch.tensor(alphas, dtype=torch.float32)[:, None]
    keys = torch.empty(n_configs, n_heads, n_slots, dim)
    values = torch.empty(n_configs, n_heads, n_slots, dim)
    score = torch.zeros(n_configs, n_slots)
    errors = Errors(n_configs, layer)
    configs = torch.arange(n_configs)
    filled, free = 0, None
    for begin, end in blocks(layer.prompt_len, layer.n_tokens):
        exact = exact_outputs(layer, begin, end)
        prompt_top, prompt_sum, prompt_out = prompt_part(layer, begin, end)
        outputs = torch.empty(n_configs, n_heads, end - begin, layer.group_size, dim)
        for t in range(begin, end):
            if filled < n_slots:
                free, filled = torch.full((n_configs,), filled), filled + 1
            keys[configs, :, free] = layer.k[:, t]
            values[configs, :, free] = layer.v[:, t]
            score[configs, free] = 0

            s = t - begin
            q = layer.q[:, t].repeat(n_configs, 1, 1)  # (C * H, G, D)
            logits = torch.bmm(q, keys[:, :, :filled].flatten(0, 1).transpose(1, 2))
            logits = logits.view(n_configs, n_heads, layer.group_size, filled)
            top = torch.maximum(prompt_top[:, s], logits.amax(-1, keepdim=True))  # (C, H, G, 1)
            weights = logits.sub_(top).exp_()
            shrink = (prompt_top[:, s] - top).exp_()
            inverse_sum = (weights.sum(-1, keepdim=True) + prompt_sum[:, s] * shrink).reciprocal_()
            own = torch.bmm(weights.view(-1, layer.group_size, filled), values[:, :, :filled].flatten(0, 1))
            outputs[:, :, s] = (own.view(n_configs, n_heads, layer.group_size, dim)
                                + prompt_out[:, s] * shrink) * inverse_sum
            attention = weights.mul_(inverse_sum).mean((1, 2))  # (C, filled)
            score[:, :filled] = score[:, :filled].mul_(alpha).add_(attention)
            if filled > budget:
                free = score.argmin(-1)
        errors.add(exact, outputs)
    return errors.mean()


def replay_blocks(layer, budget, values, method):
    """The same results by kvreplay's own plan, as far as PyTorch can follow it.

    A block's attention weights, up to their normaliser, are the same under every configuration: they are computed once
    and gathered. A configuration's doing in a block is a table of columns (what it held, then the block's own tokens);
    an eviction clears the rest of a column, and all outputs of the block are one product. Only the selection is left in
    the loop over steps.
    """
    h2o = method == "h2o"
    n_configs, n_heads, n_group, dim = len(values), layer.n_kv_heads, layer.group_size, layer.head_dim
    n_sets = n_heads if h2o else 1  # sets in a layer; a set of the whole layer serves all of its heads
    window = torch.tensor(values if h2o else [0] * n_configs)[:, None, None]
    decay = None if h2o else torch.tensor(values, dtype=torch.float32)[:, None, None]
    if h2o:
        mass = prompt_column_mass(layer).expand(n_configs, -1, -1)
        latest = torch.arange(layer.prompt_len) >= layer.prompt_len - window
        pos = mass.masked_fill(latest, INF).topk(min(budget, layer.prompt_len)).indices.sort().values
        score = mass.gather(2, pos)
    else:
        pos = torch.empty(n_configs, n_sets, 0, dtype=torch.int64)
        score = torch.empty(n_configs, n_sets, 0)
    pinned = 0 if h2o else layer.prompt_len
    resident = pos.shape[2]
    errors = Errors(n_configs, layer)
    for begin, end in blocks(layer.prompt_len, layer.n_tokens):
        steps = end - begin
        shared = causal_logits(layer, begin, end)
        shared.sub_(shared.amax(-1, keepdim=True)).exp_()  # (H, S * G, end)
        exact = torch.bmm(shared, layer.v[:, :end]).div_(shared.sum(-1, keepdim=True)).view(n_heads, steps, n_group, dim)
        pinned_sum = shared[:, :, :pinned].sum(-1).view(n_heads, steps, n_group)
        pinned_out = torch.bmm(shared[:, :, :pinned], layer.v[:, :pinned])

        columns = torch.cat([pos, torch.arange(begin, end).expand(n_configs, n_sets, steps)], 2)  # (C, sets, N)
        n = columns.shape[2]
        score = torch.cat([score, torch.zeros(n_configs, n_sets, steps)], 2)
        gone = torch.zeros(n_configs, n_sets, n, dtype=torch.bool)
        of_head = columns.expand(n_configs, n_heads, n)
        weights = shared.view(n_heads, steps * n_group, end).expand(n_configs, -1, -1, -1).gather(
            3, of_head[:, :, None].expand(-1, -1, steps * n_group, -1)).view(n_configs, n_heads, steps, n_group, n)
        sums = torch.empty(n_configs, n_heads, steps, n_group)
        for s in range(steps):
            row = weights[:, :, s]  # (C, H, G, N)
            sums[:, :, s] = row.sum(-1) + pinned_sum[:, s]
            attention = torch.matmul(sums[:, :, s].reciprocal()[:, :, None], row)[:, :, 0]  # (C, H, N), group summed
            if h2o:
                score += attention
            else:
                score.mul_(decay).add_(attention.mean(1, keepdim=True), alpha=1 / n_group)
            resident += 1
            if resident > budget:
                victim = score.masked_fill(gone | (columns > begin + s - window), INF).argmin(-1, keepdim=True)
                gone.scatter_(2, victim, True)
                weights[:, :, s + 1:].scatter_(
                    4, victim[:, :, None, None].expand(n_configs, n_heads, steps - s - 1, n_group, 1), 0)
                resident -= 1
        held = layer.v[torch.arange(n_heads)[:, None], of_head].flatten(0, 1)  # (C * H, N, D)
        outputs = torch.bmm(weights.view(-1, steps * n_group, n), held).view(n_configs, n_heads, -1, dim) + pinned_out
        errors.add(exact, outputs.view(n_configs, n_heads, steps, n_group, dim).div_(sums[..., None]))
        stays = (~gone).nonzero()[:, 2].view(n_configs, n_sets, resident)
        pos, score = columns.gather(2, stays), score.gather(2, stays)
    return errors.mean()


METHODS = {"h2o": (replay_h2o, int), "momentum": (replay_momentum, float)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("trace")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--method", choices=METHODS, required=True)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--values", required=True, help="comma list: windows in tokens for h2o, alphas for momentum")
    parser.add_argument("--plan", choices=["steps", "blocks"], default="steps",
                        help="steps: a cache as a decoder holds it, one step at a time; blocks: kvreplay's own plan")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    layer = Layer(args.trace, args.layer)
    replay, convert = METHODS[args.method]
    values = [convert(value) for value in args.values.split(",")]
    with torch.inference_mode():
        start = time.perf_counter()
        if args.plan == "steps":
            errors = replay(layer, args.budget, values)
        else:
            errors = replay_blocks(layer, args.budget, values, args.method)
        seconds = time.perf_counter() - start
    json.dump({"method": args.method, "plan": args.plan, "values": values, "error": errors, "seconds": seconds,
               "torch": torch.__version__, "threads": args.threads}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
