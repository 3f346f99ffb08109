"""The test of the claim: train what is missing, show what is stored, or train one row again.

    python tools/claim.py                            # all 63 trainings, resumable; two hours on two cores
    python tools/claim.py --show                     # the page's tables, from nbs/experiments
    python tools/claim.py --row claim-both --seed 0  # one row beside its stored record; five minutes

The page is nbs/library/40_claim.ipynb."""
import argparse
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')  # one thread per training, as the page says
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

warnings.filterwarnings('ignore', category=FutureWarning)
from sagan.checkpoints import read_log
from sagan.config import Config, presets, systems
from sagan.data import Images, load_images
from sagan.references import reference, train_evaluator
from sagan.experiments import experiments, load_experiment
from sagan.outcomes import table, table_markdown
from sagan.runner import Plan, run_experiment, train_variant

stored = Path(__file__).resolve().parent.parent/'nbs'/'experiments'
small = presets['small'].change(dtype='float32', steps=2400)
local = small.change(g_width=4, steps=1500, dtype='bfloat16')
# Name of a folder: experiment, data, configuration, seeds, steps between measurements
PARTS = {'claim': ('claim', 'twins', small, 5, 800),
         **{f'local-gap{gap}': ('local', f'twins-gap{gap}', local, 3, 750) for gap in (4, 10, 18, 24)}}
COLUMNS = ['row', 'attention at', "D's AUC", "with D's gamma 0", 'kappa', 'observed', 'luck', 'two twins',
           'color pairs', 'FID']
KEPT = 'experiment.json', 'records.json', 'samples.png', 'log.jsonl'


def make_plan(images: Images, every: int) -> Plan:
    "How one row is measured: by the small classifier on 1,000 samples"
    evaluator = train_evaluator(images)
    return Plan(every, 1000, evaluator, reference(images, evaluator), images, 'cpu')


def configure(system: str, images: Images, base: Config, seed: int) -> Config:
    "The configuration of one row and seed"
    base = base.change(data=images.name, n_classes=len(images.classes), seed=seed)
    return systems(base)[system]


def keep(folder: Path, name: str):
    "Copy the records and the pictures of samples to those of the page"
    for file in folder.rglob('*'):
        if file.name in KEPT:
            (stored/name/file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, stored/name/file.relative_to(folder))


def run_part(out: Path, jobs: int, name: str):
    "Train every row of a part that is not finished"
    experiment, data, base, seeds, every = PARTS[name]
    images = load_images(data, 32)
    run_experiment(experiment, images, base.change(data=data), out/name, seeds, every, jobs=jobs,
                   tell=lambda text: print(text, flush=True))
    keep(out/name, name)


def train_long(folder: Path, seed: int):
    "Attention in both, bfloat16, three times as long, on one thread, by the users' own command"
    options = dict(data='twins', dtype='bfloat16', steps=7200, seed=seed, measure_every=800, out=folder)
    new = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    command = Path(sys.executable).parent/'sagan-train'
    args = ['--resume', folder] if (folder/'states').exists() else new
    environment = os.environ | dict(OMP_NUM_THREADS='1')
    return subprocess.Popen([command, *args], env=environment, stdin=subprocess.DEVNULL)


def run_long(out: Path):
    "The longer runs of seeds 0 and 1, side by side"
    started = [train_long(out/'claim-long'/f'seed{seed}', seed) for seed in (0, 1)]
    for process in started:
        if process.wait(): raise SystemExit(f'{process.args} failed')
    keep(out/'claim-long', 'claim-long')


def scores(record: dict) -> str:
    "Both measures on one line"
    return f"D's AUC {record['d_auc']:.3f}  kappa {record['kappa']:.3f}"


def run_row(name: str, system: str, seed: int, out: Path):
    "Train one row and seed of a part again, and print it beside its stored record"
    _, data, base, seeds, every = PARTS[name]
    stored_seeds = next(seeds for variant, seeds in load_experiment(stored/name) if variant.name == system)
    images = load_images(data, 32)
    folder = out/'again'/name/f'{system}-seed{seed}'
    for r in train_variant(folder, configure(system, images, base, seed), make_plan(images, every)):
        print(f"step {r['step']}: {scores(r)}", flush=True)
    print(f"stored, step {stored_seeds[seed][-1]['step']}: {scores(stored_seeds[seed][-1])}")


def show():
    "The tables of the page"
    for name in PARTS:
        if (stored/name/'experiment.json').exists():
            print(f'\n{name}\n\n{table_markdown(table(load_experiment(stored/name)), COLUMNS)}')
    for folder in sorted((stored/'claim-long').glob('seed*')):
        print(f'\nclaim-long, {folder.name}\n')
        for r in read_log(folder):
            if 'd_auc' in r: print(f"step {r['step']}: {scores(r)}")


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--show', action='store_true', help='print the tables from the stored records')
    rows = [row.system for experiment in ('claim', 'local') for row in experiments[experiment]]
    p.add_argument('--row', choices=rows, metavar='ROW', help=f"train one row again: {', '.join(rows)}")
    p.add_argument('--gap', type=int, choices=(4, 10, 18, 24), default=18,
                   help='with --row local-*: which gap')
    p.add_argument('--seed', type=int, default=0, help='with --row: which seed, from 0')
    p.add_argument('--jobs', type=int, default=2, help='rows that train at once')
    p.add_argument('--out', type=Path, default=Path('runs'), help='folder of the runs')
    p.add_argument('--only', nargs='*', choices=[*PARTS, 'claim-long'],
                   default=['claim', 'claim-long', *list(PARTS)[1:]], help='parts to train, in this order')
    args = p.parse_args()
    if args.show: show()
    elif args.row:
        name = 'claim' if args.row.startswith('claim') else f'local-gap{args.gap}'
        if not 0 <= args.seed < PARTS[name][3]:
            p.error(f'{name} has the seeds 0 to {PARTS[name][3] - 1}, got {args.seed}')
        run_row(name, args.row, args.seed, args.out)
    else:
        for name in args.only:
            if name == 'claim-long': run_long(args.out)
            else: run_part(args.out, args.jobs, name)
