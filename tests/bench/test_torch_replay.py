"""torch_replay.py selects and measures as the method's definition says: compared with numpy_replay.py in float64."""
import sys
import unittest
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import numpy_replay  # noqa: E402

try:
    import torch
    import torch_replay
except ImportError:
    torch = None


def problem(n_kv_heads, group_size, n_tokens, prompt_len, head_dim, seed):
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((n_kv_heads, n_tokens, group_size, head_dim)) * head_dim**-0.5
    k = 2 * rng.standard_normal((n_kv_heads, n_tokens, head_dim))
    v = rng.standard_normal((n_kv_heads, n_tokens, head_dim))
    layer = SimpleNamespace(
        prompt_len=prompt_len, n_heads=n_kv_heads * group_size, n_tokens=n_tokens, head_dim=head_dim,
        n_kv_heads=n_kv_heads, group_size=group_size,
        **{name: torch.tensor(x, dtype=torch.float32) for name, x in (("q", q), ("k", k), ("v", v))})
    return (q, k, v), layer


@unittest.skipIf(torch is None, "PyTorch is not here; scripts/bench installs it")
class TorchReplay(unittest.TestCase):
    # budget below, at, and above the prompt; more than one block of steps; one block not full; budget 1
    SHAPES = [(2, 4, 300, 150, 16, 32), (3, 1, 200, 50, 8, 64), (1, 2, 130, 100, 8, 1), (2, 2, 90, 40, 8, 500)]

    def compare(self, fast, slow, values_of):
        for seed, (n_kv, group, tokens, prompt, dim, budget) in enumerate(self.SHAPES):
            numbers, layer = problem(n_kv, group, tokens, prompt, dim, seed)
            values = values_of(budget)
            got = fast(layer, budget, values)
            for value, error in zip(values, got):
                expected = slow(*numbers, prompt, budget, value)
                self.assertLess(abs(error - expected), 1e-5 * max(expected, 0.1), (budget, value, error, expected))

    def test_h2o(self):
        self.compare(torch_replay.replay_h2o, numpy_replay.h2o, lambda budget: [0, budget // 4, budget // 2])

    def test_momentum(self):
        self.compare(torch_replay.replay_momentum, numpy_replay.momentum, lambda budget: [0.0, 0.5, 0.97, 1.0])

    def test_h2o_by_blocks(self):
        self.compare(lambda *args: torch_replay.replay_blocks(*args, "h2o"), numpy_replay.h2o,
                     lambda budget: [0, budget // 4, budget // 2])

    def test_momentum_by_blocks(self):
        self.compare(lambda *args: torch_replay.replay_blocks(*args, "momentum"), numpy_replay.momentum,
                     lambda budget: [0.0, 0.5, 0.97, 1.0])


if __name__ == "__main__":
    unittest.main()
