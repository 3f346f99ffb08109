"""The test of the claim on page 17: train what is missing, show what is stored, or train one row again.

    python tools/claim.py                            # all of it, resumable; about two hours on two cores
    python tools/claim.py --show                     # the page's tables, from the records in nbs/experiments
    python tools/claim.py --row claim-both --seed 0  # one row again, beside its stored record; about five minutes"""
import argparse
import shutil
import warnings
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

warnings.filterwarnings('ignore', category=FutureWarning)
from sagan.data import Images, load_images
from sagan.evaluation import reference, train_evaluator
from sagan.experiments import Plan, load_experiment, run_experiment, table, table_markdown, train_line
from sagan.training import Config, presets, systems

stored = Path(__file__).resolve().parent.parent/'nbs'/'experiments'
small = presets['small'].change(dtype='float32', steps=2400)
local = small.change(g_width=4, steps=1500)
# Name of a folder: experiment, data, configuration, seeds, steps between measurements
PARTS = {'claim': ('claim', 'twins', small, 5, 800),
         **{f'local-gap{gap}': ('local', f'twins-gap{gap}', local, 3, 750) for gap in (4, 10, 18, 24)}}
LONG = dict(dtype='bfloat16', steps=7200)
COLUMNS = ['row', 'attention at', "D's AUC", "with D's gamma 0", 'kappa', 'agreement', 'luck', 'color pairs', 'FID']
KEPT = 'experiment.json', 'records.json', 'samples.png'


def make_plan(images: Images, every: int) -> Plan:
    "How one row is measured: by the small classifier on 1,000 samples"
    evaluator = train_evaluator(images)
    return Plan(every, 1000, evaluator, reference(images, evaluator), images, 'cpu')


def configure(system: str, images: Images, base: Config, seed: int, **changes) -> Config:
    "The configuration of one row and seed"
    base = base.change(data=images.name, n_classes=len(images.classes), seed=seed)
    return systems(base)[system].change(**changes)


def keep(folder: Path, name: str):
    "Copy the records and the pictures of samples to those of the page"
    for file in folder.rglob('*'):
        if file.name in KEPT:
            (stored/name/file.relative_to(folder)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, stored/name/file.relative_to(folder))


def run_parts(out: Path, jobs: int, names: list):
    "Train every row of the named parts that is not done"
    for name in names:
        experiment, data, base, seeds, every = PARTS[name]
        images = load_images(data, 32)
        run_experiment(experiment, images, base.change(data=data), out/name, seeds, every, jobs=jobs,
                       tell=lambda text: print(text, flush=True))
        keep(out/name, name)


def train_long(folder: Path, seed: int):
    "Attention in both, bfloat16, three times as long, on one thread"
    torch.set_num_threads(1)
    images = load_images('twins', 32)
    cfg = configure('claim-both', images, small, seed, **LONG)
    for r in train_line(folder, cfg, make_plan(images, 800)):
        print(f"bfloat16, seed {seed}, step {r['step']}: {scores(r)}", flush=True)


def run_long(out: Path, jobs: int):
    "The longer runs of seeds 0 and 1"
    folder = out/'claim-long'
    with ProcessPoolExecutor(jobs, get_context('spawn')) as pool:
        for done in [pool.submit(train_long, folder/f'seed{seed}', seed) for seed in (0, 1)]:
            done.result()
    keep(folder, 'claim-long')


def scores(record: dict) -> str:
    "Both measures in a line"
    return f"D's AUC {record['d_auc']:.3f}  kappa {record['kappa']:.3f}"


def run_row(system: str, data: str, seed: int, out: Path):
    "Train one row and seed again, and print it beside its stored record"
    name, (_, _, base, _, every) = next((n, p) for n, p in PARTS.items() if p[0] == system.split('-')[0] and p[1] == data)
    images = load_images(data, 32)
    folder = out/'again'/f'{system}-{data}-seed{seed}'
    for r in train_line(folder, configure(system, images, base, seed), make_plan(images, every)):
        print(f"step {r['step']}: {scores(r)}", flush=True)
    before = [r[-1] for l, seeds in load_experiment(stored/name) if l.name == system for r in seeds[seed:seed + 1]]
    for r in before: print(f"stored, step {r['step']}: {scores(r)}")


def show():
    "The tables of the page"
    for name in PARTS:
        print(f'\n{name}\n\n{table_markdown(table(load_experiment(stored/name)), COLUMNS)}')


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--show', action='store_true', help='print the tables from the stored records')
    p.add_argument('--row', help="train one row again, such as 'claim-both' or 'local-attention'")
    p.add_argument('--data', default='twins', help="with --row: 'twins' or 'twins-gap18'")
    p.add_argument('--seed', type=int, default=0, help='with --row: which seed')
    p.add_argument('--jobs', type=int, default=2, help='rows that train at once')
    p.add_argument('--out', type=Path, default=Path('runs'), help='folder of the runs')
    p.add_argument('--only', nargs='*', default=[*PARTS, 'claim-long'], help='parts to train')
    args = p.parse_args()
    if args.show: show()
    elif args.row:
        torch.set_num_threads(1)
        run_row(args.row, args.data, args.seed, args.out)
    else:
        run_parts(args.out, args.jobs, [n for n in args.only if n in PARTS])
        if 'claim-long' in args.only: run_long(args.out, args.jobs)
