"""Runs a subject with fail_io.so preloaded, which makes one of its inputs or outputs fail, or its last."""

import os
import pathlib
import shutil
import signal

from subjects import check, execute, one_sentence, works_again

LIBRARY = os.environ.get("KVREPLAY_FAIL_IO", "")


class Failing:
    def __init__(self, subject, folder):
        self.subject, self.folder = subject, pathlib.Path(folder)

    def fresh(self):
        work = self.folder / "work"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        self.subject.begin(work)
        return work

    def execute(self, work, calls, at, how):
        under = self.subject.read_from(work) if calls == "read" else work
        report = self.folder / "calls"
        report.unlink(missing_ok=True)
        done = execute(self.subject.command(work), env={
            **os.environ, "LD_PRELOAD": LIBRARY, "FAIL_IO_UNDER": f"{under}/", "FAIL_IO_CALLS": calls,
            "FAIL_IO_AT": str(at), "FAIL_IO_HOW": how, "FAIL_IO_REPORT": str(report),
            "FAIL_IO_TOUCH": str(getattr(self.subject, "trace", ""))})
        return done, int(report.read_text()) if report.exists() else None

    def count(self, calls):
        done, n = self.execute(self.fresh(), calls, 0, "EIO")
        assert done.returncode == 0, done.stderr
        assert n, "nothing is counted"
        return n

    def once(self, calls, at, how):
        """The failure of one call; whether it was felt."""
        work = self.fresh()
        done, _ = self.execute(work, calls, at, how)
        self.done = done
        if how == "KILL":
            assert done.returncode in (0, -signal.SIGKILL), (done.returncode, done.stderr)
        elif done.returncode != 0:
            codes = self.subject.read_codes if calls == "read" else self.subject.codes
            one_sentence(done, codes, self.subject.program, self.subject.sentences)
            self.subject.after_failure(work, done)
        check(self.subject, work, done)
        if done.returncode != 0:
            works_again(self.subject, work)
        return done.returncode != 0


def chosen(n, limit):
    """At most `limit` of the calls 1..n: the first, the last three, and others evenly between."""
    some = {1, n - 2, n - 1, n} | {1 + round(i * (n - 1) / max(1, limit - 4)) for i in range(max(1, limit - 3))}
    return sorted(i for i in some if 1 <= i <= n)
