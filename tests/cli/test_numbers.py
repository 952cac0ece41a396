"""The command's numbers against a page of float64 numpy that shares no line with it."""

import numpy as np
import pytest

from harness import arrays, good_run, write

H, G, D, DV = 2, 2, 8, 6            # KV heads, query heads each, widths of keys and values
P, N, BUDGET = 50, 120, 20
SCALE = D ** -0.5


def softmax(logits):
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    q, k, v = arrays(n_tokens=N, n_heads=H * G, n_kv_heads=H, head_dim=D, v_head_dim=DV, sharp=2, seed=7)
    path = write(tmp_path_factory.mktemp("numbers") / "t.h5", q, k, v, prompt_len=P)
    return path, SCALE * q[0].astype(float).reshape(H, G, N, D), k[0].astype(float), v[0].astype(float)


def attended(method, q, k):
    """kept[head][step]: the positions that the step attends."""
    layer_wide, pinned = method in ("tova", "momentum"), method == "momentum"
    kept = [[] for _ in range(H)]
    for heads in [range(H)] if layer_wide else [[h] for h in range(H)]:
        r, mass = ([] if pinned else list(range(P))), np.zeros(N)

        def attention(t, seen):
            return np.mean([softmax(k[h, seen] @ q[h, g, t]) for h in heads for g in range(G)], axis=0)

        def cut(t):
            if method == "streaming":
                score = {p: np.inf if p < 4 else p for p in r}
            elif method == "h2o":
                score = {p: np.inf if p > t - BUDGET // 2 else mass[p] for p in r}
            elif method == "tova":
                score = dict(zip(r, attention(t, r)))
            else:
                score = {p: mass[p] for p in r}
            while len(r) > BUDGET:
                r.remove(min(r, key=lambda p: (score[p], p)))

        if not pinned:
            for t in range(P):
                mass[:t + 1] += attention(t, list(range(t + 1)))
            cut(P - 1)
        for t in range(P, N):
            r.append(t)
            seen = list(range(P)) + r if pinned else list(r)
            mass *= 0.97 if pinned else 1
            mass[seen] += attention(t, seen)
            for h in heads:
                kept[h].append(seen)
            cut(t)
    return kept


def estimates(q, k, v):
    """ln of the mass and the value that each compensator takes the evicted keys and values to have."""
    n, k_mean, v_mean = len(k), k.mean(0), v.mean(0)
    dk, dv = k - k_mean, v - v_mean
    tilt, log_mass = dv.T @ (dk @ q) / n, np.log(n) + q @ k_mean
    variance = (dk ** 2).mean(0) @ q ** 2
    excess, share = variance / 2, 1.0
    if variance > 2 * np.log(n):
        limit = np.sqrt(2 * np.log(n))
        excess, share = np.sqrt(variance) * limit - np.log(n), limit / np.sqrt(variance)
    # Balls around the means. The engine keeps bounds on these radii, so it may clip a little later.
    excess = min(excess, np.linalg.norm(q) * np.linalg.norm(dk, axis=1).max())
    longest = np.linalg.norm(dv, axis=1).max()
    length = share * np.linalg.norm(tilt)
    if length > longest:
        share *= longest / length
    return {"mean": (log_mass, v_mean), "moments": (log_mass, v_mean + tilt),
            "gaussian": (log_mass + excess, v_mean + share * tilt)}


def metrics(kept, q, k, v):
    """{(query head, metric, compensator): the value of every step that counts}"""
    series = {}
    norm = np.linalg.norm

    def cosine(a, b):
        return a @ b / norm(a) / norm(b)

    for h in range(H):
        for i, r in enumerate(kept[h]):
            t = P + i
            e = np.setdiff1d(np.arange(t + 1), r)
            for g in range(G):
                def add(name, value, compensator=""):
                    series.setdefault((h * G + g, name, compensator), []).append(value)
                s = k[h, :t + 1] @ q[h, g, t]
                weight = np.exp(s)
                z_r, z_e = weight[r].sum(), weight[e].sum()
                f, f_r = weight @ v[h, :t + 1] / weight.sum(), weight[r] @ v[h, r] / z_r
                w = z_e / weight.sum()
                add("evicted_mass", w)
                add("error", norm(f - f_r) / norm(f))
                add("error_output", norm(f - f_r) / norm(f))
                if len(e) == 0:
                    for c in ("mean", "moments", "gaussian"):
                        add("error_corrected", 0, c)
                    continue
                assert w >= 1e-6
                f_e = weight[e] @ v[h, e] / z_e
                cos = cosine(f_r, f_e)
                add("cos_retained_evicted", cos)
                add("directional_mismatch", 1 - cos)
                add("norm_ratio_evicted", np.log(norm(f_e) / norm(f_r)))
                add("error_parallel", w * abs(norm(f_e) * cos - norm(f_r)) / norm(f))
                add("error_orthogonal", w * norm(f_e) * np.sqrt(1 - cos ** 2) / norm(f))
                add("logit_variance", s[e].var())
                add("logit_spread", abs(s[e] - s[e].mean()).max())
                for c, (log_mass, value) in estimates(q[h, g, t], k[h, e], v[h, e]).items():
                    def error(mass, lost):
                        return norm(f - (z_r * f_r + mass * lost) / (z_r + mass)) / norm(f)
                    add("error_corrected", error(np.exp(log_mass), value), c)
                    add("error_exact_mass", error(z_e, value), c)
                    add("error_exact_direction", error(np.exp(log_mass), f_e), c)
                    add("cos_estimate", cosine(f_e, value), c)
                    add("log_mass_ratio", np.log(z_e) - log_mass, c)
    return series


@pytest.mark.parametrize("method", ["streaming", "h2o", "tova", "momentum"])
def test_against_numpy(numbers, tmp_path, method):
    path, q, k, v = numbers
    table = good_run(path, tmp_path / "out", "-m", method, "-b", BUDGET)
    expected = metrics(attended(method, q, k), q, k, v)
    found = {(int(row["q_head"]), row["metric"], row["compensator"]): row for row in table if row["q_head"]}
    assert set(found) == set(expected)
    for key, values in expected.items():
        row, name = found[key], key[1]
        tolerance = 1e-5 if name in ("evicted_mass", "error", "error_output") else 1e-4
        if key[2] == "gaussian":
            tolerance = 5e-3  # its radii are bounds
        assert row["n"] == len(values), key
        assert row["mean"] == pytest.approx(np.mean(values), rel=tolerance, abs=tolerance / 10), key
        assert row["max"] == pytest.approx(np.max(values), rel=tolerance, abs=tolerance / 10), key
        assert row["p50"] == pytest.approx(np.median(values), rel=tolerance, abs=tolerance / 10), key
