"""Configurations drawn at random, computed by Hugging Face transformers and by our decoder. Skipped where transformers
is not installed. KVREPLAY_FAMILIES_SEED draws others."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

for module in ("torch", "transformers", "safetensors"):
    pytest.importorskip(module)

N_CASES = 12
CHECK = os.environ["KVREPLAY_CHECK_DECODER"]
MAKE = Path(__file__).parent / "families" / "make.py"


def test_random_configurations_match_transformers(tmp_path):
    seed = os.environ.get("KVREPLAY_FAMILIES_SEED", "1")
    subprocess.run([sys.executable, MAKE, tmp_path, "--random", str(N_CASES), "--seed", seed], check=True)
    done = subprocess.run([CHECK, "family", *sorted(tmp_path.iterdir())], capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
