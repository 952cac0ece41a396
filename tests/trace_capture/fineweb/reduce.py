"""reduce.py REFERENCE.npz TEXT.json: what the tests need of the independent float32 reference of fineweb-llama-3m, in
the form of families/make.py, into this folder: q, k, v and logits of some tokens, and every log-probability."""
import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

ROWS = [0, 1, 63, 1000, 1024, 1063, 1990, 2047]

reference = np.load(sys.argv[1])
text = json.loads(Path(sys.argv[2]).read_text())
ids = text["prompt"] + text["decode"]
assert reference["token_ids"].tolist() == ids
at = [reference["positions_checked"].tolist().index(row) for row in ROWS]
tensors = {"logits": reference["logits"][at], "logprob": reference["log_probability_of_next"]}
for layer in range(4):
    for name in "qkv":
        tensors[f"{name}.{layer}"] = np.ascontiguousarray(reference[f"{name}{layer}"][:, at])
folder = Path(__file__).parent
save_file(tensors, folder / "model.safetensors")
passes = [512, 512, 512, 505, 1, 1, 1, 1, 1, 1, 1]
(folder / "reference.json").write_text(json.dumps({"ids": ids, "passes": passes, "rows": ROWS}) + "\n")
