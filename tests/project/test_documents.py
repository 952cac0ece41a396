"""What the documents tell a reader to do can be done: links resolve, scripts exist, commands and flags are known.

KVREPLAY names the built program; without it the commands are checked for existing scripts and files only.
"""
import ast
import os
import re
import shlex
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KVREPLAY = os.environ.get("KVREPLAY")
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(text, *languages):
    """The fenced blocks of a document in one of these languages."""
    return [m.group(2) for m in re.finditer(r"^```(\w+)\n(.*?)^```", text, re.S | re.M) if m.group(1) in languages]


def commands(text):
    """The command lines of its shell blocks, continuation lines joined, comments and prompts removed."""
    for block in blocks(text, "sh", "bash", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words:
                yield words


def run(words, **kwargs):
    return subprocess.run(words, text=True, capture_output=True, check=False, stdin=subprocess.DEVNULL, **kwargs)


class Documents(unittest.TestCase):
    def test_links_resolve(self):
        for document in DOCUMENTS:
            text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.S | re.M)
            for target in re.findall(r"\]\(([^)\s]+)\)", text):
                if re.match(r"[a-z]+:|#", target):
                    continue
                path = document.parent / target.split("#")[0]
                self.assertTrue(path.exists(), f"{document.name} links to {target}, which does not exist")

    def test_scripts_exist_and_can_be_run(self):
        for document in DOCUMENTS:
            for words in commands(document.read_text(encoding="utf-8")):
                if words[0].startswith(("scripts/", ".ci/", "./")):
                    self.assertTrue(os.access(ROOT / words[0], os.X_OK), f"{document.name}: {words[0]}")

    def test_python_blocks_parse(self):
        for document in DOCUMENTS:
            for block in blocks(document.read_text(encoding="utf-8"), "python"):
                ast.parse(block)

    @unittest.skipUnless(KVREPLAY, "KVREPLAY does not name the program")
    def test_subcommands_and_flags_are_known(self):
        checked = 0
        for document in DOCUMENTS:
            for words in commands(document.read_text(encoding="utf-8")):
                if Path(words[0]).name != "kvreplay" or len(words) < 2:
                    continue
                subcommand = [word for word in words[1:2] if not word.startswith("-")]
                result = run([KVREPLAY, *subcommand, "--help"])
                self.assertEqual(result.returncode, 0, f"{document.name}: {' '.join(words)}: {result.stderr}")
                for flag in (word.split("=")[0] for word in words[1:] if word.startswith("--")):
                    self.assertRegex(result.stdout, rf"(?<![\w-]){flag}(?![\w-])", f"{document.name}: {' '.join(words)}")
                checked += 1
        self.assertGreater(checked, 0, "no document shows a kvreplay command")


@unittest.skipUnless(KVREPLAY, "KVREPLAY does not name the program")
class BringYourOwnTrace(unittest.TestCase):
    """The README's own example, run as printed: the Python block, then the commands of the same section."""

    def test_example_runs_as_printed(self):
        section = re.search(r"^## Bring your own trace\n(.*?)^## ", (ROOT / "README.md").read_text(), re.S | re.M)
        self.assertIsNotNone(section)
        text = section.group(1)
        with tempfile.TemporaryDirectory() as folder:
            environment = {**os.environ, "PYTHONPATH": str(ROOT / "traces/python")}
            for block in blocks(text, "python"):
                result = run([sys.executable, "-c", block], cwd=folder, env=environment)
                if "No module named 'h5py'" in result.stderr or "No module named 'numpy'" in result.stderr:
                    self.skipTest("this Python has no h5py; scripts/setup makes one that has")
                self.assertEqual(result.returncode, 0, result.stderr)
            ran = 0
            for words in commands(text):
                if Path(words[0]).name == "kvreplay" and "report" not in words:
                    result = run([KVREPLAY, *words[1:]], cwd=folder)
                    self.assertEqual(result.returncode, 0, f"{' '.join(words)}: {result.stderr}")
                    ran += 1
            self.assertGreater(ran, 0)


if __name__ == "__main__":
    unittest.main()
