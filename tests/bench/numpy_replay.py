"""The same replay as torch_replay.py, slow and obvious, in float64: one loop over steps, sets as Python lists.

It shares nothing with the fast version but the trace, and exists to be right.
"""
import numpy as np


def softmax(logits):
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def attend(q, k, v):
    """q (G, D) scaled, k and v (n, D): attention rows (G, n) and outputs (G, D)."""
    attn = softmax(q @ k.T)
    return attn, attn @ v


def relative(exact, output):
    return np.linalg.norm(exact - output, axis=-1) / np.linalg.norm(exact, axis=-1)


def lowest(scores, tokens):
    """The token with the lowest score; ties drop the older one."""
    return min(tokens, key=lambda token: (scores[token], token))


def h2o(q, k, v, prompt_len, budget, window):
    """q (H, T, G, D) scaled, k and v (H, T, D). Mean error over steps and query heads."""
    errors = []
    for qh, kh, vh in zip(q, k, v):
        mass = np.zeros(len(kh))
        for t in range(prompt_len):
            mass[:t + 1] += attend(qh[t], kh[:t + 1], vh[:t + 1])[0].sum(0)
        kept = list(range(prompt_len))

        def evict(now):
            while len(kept) > budget:
                kept.remove(lowest(mass, [token for token in kept if token <= now - window]))

        evict(prompt_len - 1)
        for t in range(prompt_len, len(kh)):
            kept.append(t)
            attn, output = attend(qh[t], kh[kept], vh[kept])
            mass[kept] += attn.sum(0)
            errors.append(relative(attend(qh[t], kh[:t + 1], vh[:t + 1])[1], output))
            evict(t)
    return np.mean(errors)


def momentum(q, k, v, prompt_len, budget, alpha):
    errors = []
    importance = np.zeros(k.shape[1])
    decoded = []
    for t in range(prompt_len, k.shape[1]):
        decoded.append(t)
        resident = list(range(prompt_len)) + decoded
        rows = []
        for qh, kh, vh in zip(q, k, v):
            attn, output = attend(qh[t], kh[resident], vh[resident])
            rows.append(attn[:, prompt_len:])
            errors.append(relative(attend(qh[t], kh[:t + 1], vh[:t + 1])[1], output))
        importance[decoded] = alpha * importance[decoded] + np.concatenate(rows).mean(0)
        if len(decoded) > budget:
            decoded.remove(lowest(importance, decoded))
    return np.mean(errors)
