"""Every command that writes, on inputs so small that it takes a moment, and what any end of it must leave intact.

A subject runs in a folder of its own. After an end of any kind `check` must hold: whatever has a final name is whole and
is either what was there before or what an undisturbed command writes. `repeat` is the command that a user then types.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import h5py
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests" / "cli"), str(ROOT / "tests" / "trace_capture")]
from capture_harness import KVCAPTURE, make_model  # noqa: E402
from harness import KVREPLAY, kvreplay, make  # noqa: E402

FINAL = ("results.h5", "run.json", "summary.csv")


def execute(command, **more):
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120, **more)


def must(command):
    done = execute(command)
    assert done.returncode == 0, (command, done.stderr)
    return done


def one_sentence(done, codes, program, most=1):
    """What a user reads of a failure that is no crash."""
    lines = [line for line in done.stderr.split("\n") if line and " to write, " not in line]
    assert done.returncode in codes, (done.returncode, done.stderr)
    assert 1 <= len(lines) <= most and all(line.startswith(program) for line in lines), done.stderr


def content_hash(trace):
    with h5py.File(trace) as file:
        return file.attrs["content_hash"], int(file.attrs["complete"])


def forced(command):
    return command if "--force" in command else [*command, "--force"]


def names(folder):
    return sorted(p.name for p in pathlib.Path(folder).iterdir()) if pathlib.Path(folder).exists() else []


class Subject:
    """`codes`: exit codes of a disk that fails while it is written; `read_codes`: while it is read; and how many
    sentences say so."""
    codes, read_codes, program, sentences = (3,), (3,), "kvreplay", 1

    def __init__(self, inputs):
        self.inputs = pathlib.Path(inputs) / type(self).__name__
        self.inputs.mkdir(parents=True)
        self.make_inputs()
        reference = self.inputs / "reference"
        reference.mkdir()
        must(self.command(reference))
        self.learn(reference)

    def make_inputs(self):
        pass

    def begin(self, work):
        """What lies in the folder before the command."""

    def repeat(self, work):
        return self.command(work)

    def read_from(self, work):
        return self.inputs

    def after_failure(self, work, done):
        """A failed command takes its temporary files with it."""
        assert not [name for name in names(work) if name.endswith((".part", ".packing", ".working"))], names(work)


class WritesTrace(Subject):
    """One trace, a.h5."""
    older = None

    def out(self, work):
        return work / "a.h5"

    def learn(self, reference):
        self.new = content_hash(self.out(reference))

    def begin(self, work):
        if self.older:
            shutil.copy(self.older, self.out(work))

    def check(self, work, reported_done):
        out = self.out(work)
        if not out.exists():
            assert not self.older and not reported_done, "a trace is lost"
            return
        must([KVREPLAY, "verify", out])
        found = content_hash(out)
        assert found == self.new or (self.older and not reported_done and found == content_hash(self.older)), found


class Repack(WritesTrace):
    def make_inputs(self):
        self.trace = make(self.inputs / "t.h5", n_tokens=96, layers=(0, 1))

    def command(self, work):
        return [KVREPLAY, "repack", self.trace, self.out(work), "--profile", "archive", "--chunk-tokens", 64]


class RepackOver(Repack):
    """--force over a trace of another content."""
    def make_inputs(self):
        super().make_inputs()
        self.older = make(self.inputs / "older.h5", n_tokens=80, seed=5)

    def command(self, work):
        return forced(super().command(work))


class Import(WritesTrace):
    def make_inputs(self):
        draw = np.random.default_rng(0)
        arrays = {"token_ids": np.arange(48)}
        for layer in (0, 1):
            for name, heads in (("q", 2), ("k", 1), ("v", 1)):
                arrays[f"{name}{layer}"] = draw.standard_normal((heads, 48, 8)).astype("f4")
        np.savez(self.inputs / "t.npz", **arrays)

    def command(self, work):
        return [KVREPLAY, "import", self.inputs / "t.npz", self.out(work), "--prompt-len", 32, "--attention-scale", 0.35,
                "--rope-theta", 10000]


class Synth(WritesTrace):
    read_codes = ()

    def command(self, work):
        return [KVREPLAY, "synth", self.out(work), "--tokens", 64, "--prompt-len", 40, "--heads", 2, "--kv-heads", 1,
                "--head-dim", 8]


class Recover(WritesTrace):
    """The interrupted capture itself must survive its rescue."""
    def make_inputs(self):
        part = make(self.inputs / "a.h5.part", n_tokens=96, layers=(0, 1))
        with h5py.File(part, "r+") as file:
            file.attrs["complete"] = np.int64(0)
            file["n_valid"][()] = 70

    def begin(self, work):
        super().begin(work)
        shutil.copy(self.inputs / "a.h5.part", work)

    def read_from(self, work):
        return work

    def command(self, work):
        if not (work / "a.h5.part").exists():
            self.begin(work)
        return [KVREPLAY, "recover", work / "a.h5.part", self.out(work)]

    def check(self, work, reported_done):
        super().check(work, reported_done)
        assert (work / "a.h5.part").read_bytes() == (self.inputs / "a.h5.part").read_bytes()

    def after_failure(self, work, done):
        assert set(names(work)) <= {"a.h5", "a.h5.part"}, names(work)


class Capture(WritesTrace):
    """Of a model of random weights; what a killed one leaves is recovered to a prefix of the whole capture."""
    program, read_codes, n_new = "kvcapture", (1, 2, 3), 24

    def make_inputs(self):
        self.model = make_model(self.inputs / "model", max_position_embeddings=200000)
        (self.inputs / "ids.json").write_text("[1, 2, 3, 4, 5, 6, 7, 8]")

    def learn(self, reference):
        super().learn(reference)
        with h5py.File(self.out(reference)) as file:
            self.tokens = file["tokens/id"][:]
            self.k = file["layers/002/k"][:]

    def command(self, work):
        return [KVCAPTURE, "--model", self.model, "--tokens", self.inputs / "ids.json", "--max-new-tokens", self.n_new,
                "--threads", 1, "--ignore-eos", "--out", self.out(work)]

    def repeat(self, work):
        return forced(self.command(work))

    def recovered(self, work):
        """How many tokens `recover` saves of what is left; None where it says that there are none."""
        part = pathlib.Path(str(self.out(work)) + ".part")
        saved = work / "saved.h5"
        done = kvreplay("recover", part, saved)
        if done.returncode == 0:
            must([KVREPLAY, "verify", saved])
            with h5py.File(saved) as file:
                n = len(file["tokens/id"])
                assert np.array_equal(file["tokens/id"][:], self.tokens[:n])
                assert np.array_equal(file["layers/002/k"][:], self.k[:, :n])
            saved.unlink()
            return n
        assert not saved.exists()
        one_sentence(done, (2, 3), "kvreplay")
        if "is complete" in done.stderr:  # killed between its last byte and its final name
            must([KVREPLAY, "verify", part])
            assert content_hash(part) == self.new
            return len(self.tokens)
        return None

    def check(self, work, reported_done):
        super().check(work, reported_done)
        if pathlib.Path(str(self.out(work)) + ".part").exists():
            assert not reported_done
            self.recovered(work)

    def after_failure(self, work, done):
        left = names(work)
        if "a.h5.part" in left:
            torn = "cannot be read any more" in done.stderr  # the half-written byte was in the head of the file
            assert torn or "kvreplay recover" in done.stderr, done.stderr
            assert (self.recovered(work) is None) == torn
        else:
            assert set(left) <= {"a.h5"}, left


class CaptureOver(Capture):
    """--force over an older trace."""
    def make_inputs(self):
        super().make_inputs()
        self.older = make(self.inputs / "older.h5", n_tokens=80, seed=5)

    def command(self, work):
        return forced(super().command(work))


class CaptureMany(Subject):
    """A file of prompts: every trace that was reported is there."""
    program, read_codes = "kvcapture", (1, 2, 3)

    def make_inputs(self):
        self.model = make_model(self.inputs / "model")
        (self.inputs / "prompts.jsonl").write_text("".join(
            json.dumps({"name": name, "tokens": [i + 1, 2, 3]}) + "\n" for i, name in enumerate("abc")))

    def command(self, work):
        return [KVCAPTURE, "--model", self.model, "--prompts", self.inputs / "prompts.jsonl", "--max-new-tokens", 8,
                "--threads", 1, "--json", "--out", work / "out"]

    def repeat(self, work):
        return forced(self.command(work))

    def learn(self, reference):
        self.new = {p.name: content_hash(p) for p in (reference / "out").iterdir()}
        assert len(self.new) == 3

    def check(self, work, reported_done, stdout=""):
        there = names(work / "out")
        for line in stdout.split("\n"):
            if line.endswith("}"):
                assert os.path.basename(json.loads(line)["trace"]) in there, (line, there)
        for name in there:
            if name.endswith(".h5"):
                must([KVREPLAY, "verify", work / "out" / name])
                assert content_hash(work / "out" / name) == self.new[name]
        assert not reported_done or set(self.new) <= set(there)

    def after_failure(self, work, done):
        pass


class Run(Subject):
    codes, budget = (1,), "8,16"

    def make_inputs(self):
        self.trace = make(self.inputs / "t.h5", n_tokens=96, layers=(0, 1))

    def arguments(self, out, budget):
        return [KVREPLAY, "run", self.trace, "-m", "h2o,tova", "-b", budget, "--threads", 1, "--metrics",
                "error,evicted_mass", "--detail", "retained", "--out", out]

    def command(self, work):
        return self.arguments(work / "out", self.budget)

    def repeat(self, work):
        return forced(self.command(work))

    @staticmethod
    def tables(out):
        return tuple((out / name).read_bytes() for name in ("results.h5", "summary.csv"))

    def learn(self, reference):
        self.new, self.old = self.tables(reference / "out"), None

    def check(self, work, reported_done):
        out = work / "out"
        said = json.loads((out / "run.json").read_text()) if (out / "run.json").exists() else None
        if said and not said["complete"]:  # what was finished when the trace could not be read on
            assert not reported_done
            lines = (out / "summary.csv").read_bytes().splitlines()
            assert len(lines) > 1 and set(lines) <= set(self.new[1].splitlines())
            with h5py.File(out / "results.h5") as file:
                assert len(file["cells/layer"]) > 0
            return
        if said:  # describes both tables
            whole = self.new if ",".join(said["budgets"]) == self.budget else self.old
            assert self.tables(out) == whole
            return
        assert not reported_done
        allowed = [self.new] + ([self.old] if self.old else [])
        for name, place in (("results.h5", 0), ("summary.csv", 1)):
            if (out / name).exists():
                assert (out / name).read_bytes() in [tables[place] for tables in allowed], name
        self.refused_by_readers(out)

    def refused_by_readers(self, out):
        """A folder without run.json is no result, and says so."""
        if not (out / "summary.csv").exists() and not (out / "results.h5").exists():
            return
        for command in (("explain", out, "--method", "h2o"), ("report", out)):
            done = kvreplay(*command)
            one_sentence(done, (1, 2), "kvreplay")
            assert "run.json" in done.stderr, done.stderr

    def after_failure(self, work, done):
        assert not [name for name in names(work / "out") if name not in FINAL], names(work / "out")


class RunOver(Run):
    """--force over older results: nothing of them is lost before the new ones are whole."""
    def make_inputs(self):
        super().make_inputs()
        must(self.arguments(self.inputs / "older", "24"))

    def begin(self, work):
        shutil.copytree(self.inputs / "older", work / "out")

    def command(self, work):
        return forced(super().command(work))

    def learn(self, reference):
        super().learn(reference)
        self.old = self.tables(self.inputs / "older")

    def after_failure(self, work, done):
        super().after_failure(work, done)
        # Room that runs out is noticed before the old results go; only a rename that fails may come later.
        if "rename" not in done.stderr and "out: cannot be flushed" not in done.stderr:
            assert names(work / "out") == sorted(FINAL), (names(work / "out"), done.stderr)


class Sweep(Subject):
    """Resumes by itself; what one process finished is never done again."""
    codes, read_codes, sentences = (1,), (1, 2, 3), 2  # one for each layer

    def make_inputs(self):
        self.trace = make(self.inputs / "t.h5", n_tokens=96, layers=(0, 1))
        (self.inputs / "plan.toml").write_text("""
traces = ["t.h5"]
methods = ["h2o", "tova"]
budgets = [8, 16]
metrics = ["error", "evicted_mass"]
compensators = []
""")

    def command(self, work):
        return [KVREPLAY, "sweep", self.inputs / "plan.toml", "--out", work / "out", "--threads", 1]

    def learn(self, reference):
        self.new = (reference / "out" / "cells.csv").read_bytes().splitlines()

    def check(self, work, reported_done):
        out = work / "out"
        if (out / "cells.csv").exists():
            lines = (out / "cells.csv").read_bytes().splitlines()
            # Without the cells whose trace could not be read.
            assert lines == self.new if reported_done else set(lines[1:]) <= set(self.new[1:])
        else:
            assert not reported_done
        if (out / "sweep.json").exists():
            json.loads((out / "sweep.json").read_text())
            said = json.loads(must([KVREPLAY, "status", out, "--json"]).stdout)
            assert said["damaged"] == [] and said["done"] + said["failed"] + said["left"] in (0, len(self.new) - 1), said

    def after_failure(self, work, done):
        assert not list((work / "out").rglob("*.part")), list((work / "out").rglob("*.part"))


SUBJECTS = {kind.__name__: kind for kind in
            (Repack, RepackOver, Import, Synth, Recover, Capture, CaptureOver, CaptureMany, Run, RunOver, Sweep)}


def check(subject, work, done):
    """After an end of any kind. What a command said it has done is done."""
    if isinstance(subject, CaptureMany):
        subject.check(work, done.returncode == 0, done.stdout)
    else:
        subject.check(work, done.returncode == 0)


def works_again(subject, work):
    """What a user types next brings the whole result."""
    done = execute(subject.repeat(work))
    if subject.repeat(work) == subject.command(work) and done.returncode == 2 and "--force" in done.stderr:
        done = execute(forced(subject.command(work)))  # it had been published already
    assert done.returncode == 0, done.stderr
    check(subject, work, done)
