"""stories260K (TinyStories, from llama2.c), whose weights are not part of this repository, continues as an independent
float64 computation says. KVREPLAY_STORIES260K names the folder with its config.json, model.safetensors and
greedy_reference.json."""
import os
import subprocess
from pathlib import Path

import pytest

FOLDER = os.environ.get("KVREPLAY_STORIES260K")
if not FOLDER:
    pytest.skip("KVREPLAY_STORIES260K is not set", allow_module_level=True)


def test_greedy_tokens_are_the_reference():
    command = [os.environ["KVREPLAY_CHECK_DECODER"], "greedy", FOLDER, Path(FOLDER) / "greedy_reference.json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
