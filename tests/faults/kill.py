#!/usr/bin/env python3
"""Kills commands at random moments, and says what they left.

  tests/faults/kill.py --rounds 500 --seed 1 [--only Run,Capture]
"""

import argparse
import collections
import pathlib
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

from subjects import SUBJECTS, check, works_again


def moment(draw, seconds):
    """When to kill a command that takes `seconds`: any time, or about its end, where files get their final names."""
    return draw.uniform(0, 1.05 * seconds) if draw.random() < 0.5 else seconds * min(1.1, draw.gauss(0.93, 0.07))


class Killed:
    def __init__(self, command, after):
        start = time.monotonic()
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True)
        try:
            self.stdout, self.stderr = process.communicate(timeout=max(0.0, after))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            self.stdout, self.stderr = process.communicate()
        self.seconds = time.monotonic() - start
        self.returncode = process.returncode
        assert self.returncode in (0, -signal.SIGKILL), (self.returncode, self.stderr)


class Victim:
    """A subject whose duration is known, and followed, as other programs slow the machine down."""

    def __init__(self, subject, folder):
        self.subject, self.folder = subject, folder
        self.times = collections.deque((self.undisturbed() for _ in range(3)), maxlen=5)

    def fresh(self):
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self.subject.begin(work)
        return work

    def undisturbed(self):
        done = Killed(self.subject.command(self.fresh()), 60)
        assert done.returncode == 0, done.stderr
        return done.seconds

    def round(self, draw):
        """Whether the command was killed before its end."""
        work = self.fresh()
        done = Killed(self.subject.command(work), moment(draw, statistics.median(self.times)))
        if done.returncode == 0:
            self.times.append(done.seconds)
        check(self.subject, work, done)
        works_again(self.subject, work)
        return done.returncode != 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(SUBJECTS), help="a comma list of " + ", ".join(SUBJECTS))
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        victims = {name: Victim(SUBJECTS[name](folder), folder / name) for name in options.only.split(",")}
        killed, left = collections.Counter(), collections.Counter()
        start = time.monotonic()
        for i in range(options.rounds):
            name = list(victims)[i % len(victims)]
            try:
                killed[name] += victims[name].round(draw)
            except BaseException:
                kept = pathlib.Path(tempfile.mkdtemp(prefix="kvreplay-kill-"))
                shutil.copytree(victims[name].folder, kept / name)
                print(f"round {i} of {name} failed; what it left is in {kept}", file=sys.stderr)
                raise
            left["rounds"] += 1
        print(f"{left['rounds']} rounds in {time.monotonic() - start:.0f} s, {sum(killed.values())} killed before their "
              f"end ({', '.join(f'{name} {n}' for name, n in killed.items())}): nothing lost, nothing half-written")


if __name__ == "__main__":
    main()
