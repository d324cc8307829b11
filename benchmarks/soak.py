"""Proof under fire: runs that are killed, stopped, starved of disk, left by a rank, and fed with bad input.

python benchmarks/soak.py [--quick] [--kills 100] [--terms 20] [--disks 6] [--ranks 6] [--seed 0]

What a run under fire leaves has to be what the undisturbed run left: every step once in metrics.jsonl, with
the same numbers, the same weights to the last bit, and no file beside them. Each process is a fork of this
one, which has loaded the libraries, so a hundred runs take minutes; and which computes nothing itself, for
torch's threads do not outlive a fork. A disk that is full is a tmpfs, which
needs the right to mount one (`unshare -rm` gives it).
"""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

import bad_inputs
import datasets
from harness import ROOT, parse, write

import dpo_padding_free
import grpo_zero3
import sft_packing
from common.folders import CHECKPOINT
from common.plot import read_metrics
from common.run import run_script

SCRIPTS = {script.__name__: script for script in (sft_packing, dpo_padding_free, grpo_zero3)}
STEPS = 8
SAVED = ["--save_steps=1", "--save_total_limit=2", f"--max_steps={STEPS}", "--learning_rate=1e-3"]
FLAGS = {  # of runs of a few seconds on the demo's model and data
    "sft_packing": [*SAVED, "--max_length=128", "--packing_strategy=bfd_split"],
    "dpo_padding_free": [*SAVED, "--max_tokens_per_batch=600", "--max_length=256"],
    "grpo_zero3": [*SAVED, "--per_device_train_batch_size=8", "--num_generations=4"],
}
FLAGS["grpo_zero3"] += ["--max_completion_length=8", "--no_ds3_gather_for_generation"]
CLOCK = ("seconds", "_per_second", "peak_memory_bytes")  # what differs between two equal runs
TIMEOUT_S, RANK_TIMEOUT_S = 300, 20
MOUNT = ["mount", "-t", "tmpfs", "-o"]


# --- Processes ---


@dataclass
class Started:
    """A run's processes, one for each rank, and the file that takes what they print."""

    pids: list
    log: Path

    def kill(self, which=signal.SIGKILL, ranks=None):
        for pid in self.pids if ranks is None else [self.pids[rank] for rank in ranks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, which)

    def wait(self, seconds=TIMEOUT_S):
        """Exit codes of all ranks, negative for a signal; None for one that had to be killed in the end."""
        codes, until = dict.fromkeys(self.pids), time.monotonic() + seconds
        while None in codes.values() and time.monotonic() < until:
            for pid in [pid for pid, code in codes.items() if code is None]:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        for pid in [pid for pid, code in codes.items() if code is None]:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        return list(codes.values())


def start(script, words, log, ranks=1):
    """Start `python script words`, on so many ranks, as forks of this process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    sys.stdout.flush()
    pids = []
    for rank in range(ranks):
        if pid := os.fork():
            pids.append(pid)
            continue
        code = 1
        try:
            if ranks > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.argv = [f"{script}.py", *words]
            run_script(SCRIPTS[script].main, SCRIPTS[script].Arguments)
            code = 0
        except SystemExit as end:
            code = end.code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return Started(pids, log)


def contents(file):
    """{name: bytes} of a safetensors file, whose header may name them in any order."""
    content = file.read_bytes()
    [size] = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    return {name: data[slice(*x["data_offsets"])] for name, x in header.items() if name != "__metadata__"}


def outcome(folder):
    """What a finished run left: steps without what the clock says; weights, and of SFT and DPO what the last
    checkpoint holds in fp32; names of all files, whole checkpoints aside.
    """
    steps = [
        {name: value for name, value in step.items() if not any(word in name for word in CLOCK)}
        for step in read_metrics(folder)
    ]
    tensors = [folder / "model.safetensors", *sorted(folder.glob(f"checkpoint-{STEPS}/*.safetensors"))]
    files = sorted(path.name for path in folder.iterdir() if not CHECKPOINT.fullmatch(path.name))
    return steps, [contents(file) for file in tensors], files


def difference(found, expected):
    """What of an outcome is not as expected, in a few words; None if nothing is."""
    (steps, weights, files), (other_steps, other_weights, other_files) = found, expected
    if [step["step"] for step in steps] != [step["step"] for step in other_steps]:
        return f"steps {[step['step'] for step in steps]}"
    for one, other in zip(steps, other_steps):
        if one != other:
            return f"step {one['step']}: {sorted(name for name in other if one.get(name) != other[name])}"
    if weights != other_weights:
        return "weights"
    return None if files == other_files else f"files {sorted(set(files) ^ set(other_files))}"


class Target:
    """A script on so many ranks: outcome and duration of its undisturbed run, and a folder to run in."""

    def __init__(self, script, ranks, scratch):
        self.script, self.ranks = script, ranks
        self.folder = scratch / f"{script}-{ranks}"
        self.folder.mkdir()
        self.run_folder, self.log = self.folder / "run", self.folder / "log"
        started = time.monotonic()
        self.go(self.folder / "undisturbed").check()
        self.seconds, self.expected = time.monotonic() - started, outcome(self.folder / "undisturbed")

    def go(self, folder=None, *words):
        """Start the run, or go on with it from its latest checkpoint."""
        folder = folder or self.run_folder
        words = [f"--output_dir={folder}", *FLAGS[self.script], *words]
        if list(folder.glob("checkpoint-*/progress.json")):
            words.append("--resume_from_checkpoint=latest")
        elif folder.exists():
            words.append("--overwrite_output_dir")
        self.log.write_text("")
        self.started = start(self.script, words, self.log, self.ranks)
        return self

    def check(self):
        codes = self.started.wait()
        if codes != [0] * self.ranks:
            raise RuntimeError(f"{self.script}: codes {codes}\n{self.log.read_text()[-3000:]}")

    def finished(self):
        return (self.run_folder / "summary.json").exists()

    def differs(self):
        """Let the run come to its end: how its outcome differs, or None; the folder is free again."""
        try:
            if not self.finished():
                self.go().check()
            return difference(outcome(self.run_folder), self.expected)
        except (RuntimeError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        finally:
            shutil.rmtree(self.run_folder)


# --- What happens to them ---


def disturbed(target, times, disturb):
    """Start a run again and again, disturb each start at a random moment, and let it end in the end.

    Args:    times: how many starts are disturbed; disturb: function of the target and a moment in seconds:
             what was wrong, or None, and whether the run was disturbed (it may have ended before).
    Returns: how many starts were disturbed; how many runs came to their end; what was wrong, as lines.
    """
    done, ended, wrong = 0, 0, []
    for _ in range(20 * times):
        problem, hit = disturb(target, random.uniform(0, target.seconds))
        wrong += [problem] if problem else []
        done += hit
        if not hit or done == times or target.finished():
            problem, ended = target.differs(), ended + 1
            wrong += [problem] if problem else []
        if done == times:
            return {"disturbed": done, "runs": ended, "wrong": wrong}
    return {"disturbed": done, "runs": ended, "wrong": [*wrong, f"{done} of {times} were disturbed"]}


def killed(target, seconds):
    target.go()
    time.sleep(seconds)
    target.started.kill()
    codes = target.started.wait()
    hit = -signal.SIGKILL in codes
    # where one rank dies a moment before the other, a collective of that one breaks off
    right = set(codes) <= {0, 1, -signal.SIGKILL} if hit else codes == [0] * target.ranks
    return None if right else f"SIGKILL: codes {codes}: {target.log.read_text()[-300:]}", hit


def terminated(target, seconds):
    """All ranks, as launchers do; but for the last step, checkpoints are those of the signal."""
    target.go(None, f"--save_steps={STEPS}", "--collective_timeout_s=20")
    time.sleep(seconds)
    target.started.kill(signal.SIGTERM)
    codes, said = target.started.wait(), target.log.read_text()
    if "stopped: saved checkpoint-" in said:
        return None if codes == [0] * target.ranks else f"SIGTERM: codes {codes}", True
    if target.finished():
        return None if codes == [0] * target.ranks else f"SIGTERM: codes {codes}", False
    # before the first step, whose start is said, a process may just end
    early = "\nrun       " not in said and -signal.SIGTERM in codes
    return None if early else f"SIGTERM: codes {codes}: {said[-300:]}", True


def may_mount():
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([*MOUNT, "size=1m", "tmpfs", folder], capture_output=True)
        return done.returncode == 0 and subprocess.run(["umount", folder]).returncode == 0


def disk_full(target, rng):
    """On a disk of a random size, which is then made large. Returns what was wrong, or None."""
    used = sum(path.stat().st_size for path in (target.folder / "undisturbed").rglob("*") if path.is_file())
    target.run_folder.mkdir()
    size = int(rng.uniform(0.05, 1.0) * used)
    subprocess.run([*MOUNT, f"size={size}", "tmpfs", str(target.run_folder)], check=True)
    try:
        codes = target.go().started.wait()
        said = "can no longer be written" in target.log.read_text()
        full = 2 in codes and set(codes) <= {1, 2} and said  # the other rank may lose a collective
        wrong = None if full or codes == [0] * target.ranks else f"disk: codes {codes}"
        subprocess.run(["mount", "-o", "remount,size=1g", str(target.run_folder)], check=True)
        if not target.finished():
            target.go().check()
        return wrong or difference(outcome(target.run_folder), target.expected)
    except RuntimeError as error:
        return str(error)
    finally:
        subprocess.run(["umount", str(target.run_folder)], check=True)
        shutil.rmtree(target.run_folder)


def rank_lost(target, which, rng):
    """One of two ranks is killed or stopped. Returns what was wrong, or None: the other one has to end, and
    to name the phase.
    """
    target.log.write_text("")
    words = [*FLAGS[target.script], f"--output_dir={target.run_folder}"]
    words += [f"--collective_timeout_s={RANK_TIMEOUT_S}", "--max_steps=100000"]
    begun = start(target.script, words, target.log, target.ranks)
    until = time.monotonic() + 120
    while not (target.run_folder / "metrics.jsonl").exists():
        if time.monotonic() > until:
            begun.kill()
            return f"no step within two minutes: codes {begun.wait()}"
        time.sleep(0.05)
    time.sleep(rng.uniform(0, 2))
    lost = rng.randrange(target.ranks)
    begun.kill(which, [lost])
    at = time.monotonic()
    codes = Started([pid for rank, pid in enumerate(begun.pids) if rank != lost], target.log).wait(60)
    took, text = time.monotonic() - at, target.log.read_text()
    begun.kill(ranks=[lost])
    os.waitpid(begun.pids[lost], 0)
    shutil.rmtree(target.run_folder)
    if None in codes or took > RANK_TIMEOUT_S + 10:
        return f"{took:.0f} s, codes {codes}"
    named = re.search(rf"rank {1 - lost}: .*: (nothing has moved for|a collective broke off)", text)
    return None if codes[0] and named else f"codes {codes}: {text[-400:]}"


def refused(number, bad, scratch):
    """A bad input of bad_inputs.py. Returns: its name, the message; what was wrong, or None."""
    folder = scratch / f"bad-{number}"
    folder.mkdir()
    script, name, words, expected = bad(folder)
    log, output = folder / "log", folder / "out"
    if not any(word.startswith("--output_dir") for word in words):
        words = [*words, f"--output_dir={output}"]
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    [code] = start(script, words, log).wait()
    text = log.read_text()
    message = ([""] + text.splitlines())[-1]
    message = message.replace(str(folder), "..").replace(f"{ROOT}/", "")
    after = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != log}
    wrong = [
        *([f"code {code}"] if code != 2 else []),
        *(["a traceback"] if "Traceback" in text else []),
        *([f"says {message!r}"] if expected not in message else []),
        *(["files changed"] if after != before else []),
    ]
    return {"script": script, "input": name, "message": message, "wrong": wrong}


def main():
    options = parse(__doc__, kills=100, terms=20, disks=6, ranks=6, seed=0)
    if options.quick:
        options.kills, options.terms, options.disks, options.ranks = 6, 3, 0, 1
    os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    random.seed(options.seed)
    cases = []

    def report(name, count, wrong, **further):
        cases.append({"case": name, "count": count, "wrong": wrong, **further})
        print(f"{name}: {count}, wrong: {wrong or 'none'}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        datasets.config.HF_DATASETS_CACHE = str(scratch / "cache")
        under_fire = options.kills + options.terms + options.disks + options.ranks
        targets = [Target(script, n, scratch) for script in SCRIPTS for n in (1, 2)] if under_fire else []
        for what, times, how in (("SIGKILL", options.kills, killed), ("SIGTERM", options.terms, terminated)):
            for i, target in enumerate(targets[:times]):
                done = disturbed(target, len(range(i, times, len(targets))), how)
                name = f"{what}, {target.script}.py, {target.ranks} ranks"
                report(name, done["disturbed"], done["wrong"], runs=done["runs"])
        disks = options.disks if may_mount() else 0
        if disks < options.disks:
            report("full disk: not run, no right to mount one", 0, [])
        for i in range(disks):
            target = targets[i % len(targets)]
            wrong = disk_full(target, random)
            report(f"full disk, {target.script}.py, {target.ranks} ranks", 1, [wrong] if wrong else [])
        for i in range(options.ranks):
            target, which = targets[2 * (i % 3) + 1], (signal.SIGKILL, signal.SIGSTOP)[i % 2]
            wrong = rank_lost(target, which, random)
            what = "is killed" if which == signal.SIGKILL else "hangs"
            report(f"one of two ranks {what}, {target.script}.py", 1, [wrong] if wrong else [])
        bad = bad_inputs.ALL[:: 8 if options.quick else 1]
        found = [refused(number, each, scratch) for number, each in enumerate(bad)]
        wrong = [f"{each['script']}, {each['input']}: {each['wrong']}" for each in found if each["wrong"]]
        runs = list(cases)
        report("bad input", len(found), wrong, inputs=found)
    if under_fire:
        write("reliability", options, None, runs, reads=())
    write("refusals", options, None, cases[len(runs) :], reads=())
    return int(any(each["wrong"] for each in cases))


if __name__ == "__main__":
    sys.exit(main())
