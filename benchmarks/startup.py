"""Processor time from the start of a command to its first word, its answer, or its first step.

    python benchmarks/startup.py --out FILE.json

Every line is a separate process with one thread, so on an idle machine this is the time that you wait. Each
runs three times, after one that fills the caches, and counts with the least of the three."""
import argparse, json, os, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path

COMMANDS = {
    'Python alone': ['-c', 'pass'],
    'sagan-train --help': ['-m', 'sagan', 'train', '--help'],
    'a mistyped option': ['-m', 'sagan', 'train', '--ema-begin', '5'],
    'data that are not there': ['-m', 'sagan', 'train', '--data', 'nowhere'],
    'import torch': ['-c', 'import torch']}

def run(args, folder):
    "Processor time of a Python process in a folder, and its standard output"
    def used():
        t = os.times()
        return t.children_user + t.children_system
    before = used()
    done = subprocess.run([sys.executable, *args], cwd=folder, env=os.environ | dict(OMP_NUM_THREADS='1'),
                          capture_output=True, text=True)
    return used() - before, done.stdout

def watch_training():
    "Run sagan-train, print the processor time of its stations, and leave before the first step"
    from sagan import cli
    loading = cli.loading
    def note(what): print(json.dumps([what, time.process_time()]), flush=True)
    @contextmanager
    def watched(*args, **kw):
        with loading(*args, **kw):
            note('sagan-train to its first word')
            yield
        note('sagan-train to the end of its imports')
        import sagan.runs
        def first_step(*args):
            note('sagan-train to its first step')
            os._exit(0)
        sagan.runs.fit_run = first_step
    cli.loading = watched
    cli.sagan_train.from_shell([])

def measure(rounds=3):
    "{what: least seconds}"
    found = {}
    here = Path(__file__).resolve()
    for i in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            timed = [(what, run(args, folder)[0]) for what, args in COMMANDS.items()]
            _, said = run([here, '--watch'], folder)
        timed += [json.loads(line) for line in said.splitlines() if line.startswith('["')]
        if i: found = {what: min(seconds, found.get(what, seconds)) for what, seconds in timed}
    return found

if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, help='JSON file for the results')
    p.add_argument('--watch', action='store_true', help='only run the training that is watched')
    a = p.parse_args()
    if a.watch: watch_training()
    # the training that is watched must find PyTorch not yet loaded
    import torch
    from step import machine
    about = dict(machine=machine('cpu'), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    results = about | dict(seconds=measure())
    if a.out: a.out.write_text(json.dumps(results, indent=1), encoding='utf-8')
    for what, seconds in results['seconds'].items(): print(f'{seconds:6.2f} s  {what}')
