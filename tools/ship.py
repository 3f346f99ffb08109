"""Put the runs that come with the package into sagan/runs.

    python tools/claim.py --only claim-long    # trains two runs on twins; ten minutes on two idle cores
    python tools/ship.py                       # trains digits, chooses among the twins, checks, and copies
    python tools/ship.py RUN FOLDER            # the run of photographs, trained on the images of FOLDER

Digits is the default run. Twins is one of the two longer runs of the page of the claim
(nbs/library/40_claim.ipynb): the one with the higher kappa at its last step. It must have learned
agreement, and its weights must give the scores that its log says.

The run of photographs is of CIFAR-10's 50,000 training images, in a folder named cifar10 with a subfolder
per class (nbs/library/60_photographs.ipynb):

    sagan-train --data cifar10 --out photographs --preset photos --steps 72000 --measure-every 2000 \\
        --samples 5000"""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from matplotlib.figure import Figure
from sagan.attention import attention_maps
from sagan.checkpoints import Run, read_log, save_weights
from sagan.data import load_images, twins
from sagan.evaluation import frechet_distance
from sagan.measuring import load_or_train_evaluator, measure_generator
from sagan.references import reference, train_evaluator
from sagan.reports import draw_nearest, save_figure
from sagan.runs import load_run
from sagan.visualization import attention_figure

root = Path(__file__).resolve().parent.parent
FILES = 'config.json', 'weights.safetensors', 'log.jsonl'
GRIDS = 0, 1000, 2000, 4000, 8000, 16000, 24000, 32000, 48000, 72000
# What a run that has learned agreement has at least; luck and chance are 0 and 0.5
LEAST = dict(kappa=.1, d_auc=.55)


def choose_run(folder: Path) -> Path:
    "The run in a folder of runs whose last measurement has the highest kappa"
    runs = sorted(folder.glob('seed*'))
    if not runs:
        raise FileNotFoundError(f"{folder} holds no runs; make them with tools/claim.py --only claim-long")
    return max(runs, key=lambda run: last_scores(run)['kappa'])


def last_scores(run: Path) -> dict:
    "The last measurement in a run's log"
    return [r for r in read_log(run) if 'kappa' in r][-1]


def measure_twins(run: Path) -> dict:
    "The scores of a run on twins, on 1,000 samples"
    images = twins()
    evaluator = train_evaluator(images)
    model = load_run(run).model
    return measure_generator(model.ema, images, evaluator, reference(images, evaluator), 1000, D=model.D)


def check_learned(scores: dict):
    "Raise `ValueError` for a run that did not learn agreement"
    for name, least in LEAST.items():
        if not scores[name] >= least:
            raise ValueError(f"{name} is {scores[name]:.3f}, below {least}: this run did not learn agreement")


def ship(run: Path, name: str):
    "Copy the parts of a run that the package needs into sagan/runs"
    target = root/'sagan'/'runs'/name
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES: shutil.copy(run/file, target)


def ship_digits():
    "Train the default run, and ship it"
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([Path(sys.executable).parent/'sagan-train', '--out', f'{tmp}/run'], check=True)
        ship(Path(tmp)/'run', 'digits')


def ship_twins(folder: Path):
    "Ship the chosen run on twins, if it has learned agreement"
    run = choose_run(folder)
    scores = measure_twins(run)
    check_learned(scores)
    for name in LEAST:
        logged = last_scores(run)[name]
        if abs(scores[name] - logged) > .01:
            raise ValueError(f"{name} is {scores[name]:.3f}, but the log says {logged:.3f}")
    ship(run, 'twins')
    print(f"twins: {run.name}, kappa {scores['kappa']:.3f}, D's AUC {scores['d_auc']:.3f}")


def ship_photographs(folder: Path, data: Path):
    "Ship a run of photographs with rounded weights and a thinned log, and its pictures for the docs"
    run, shown = load_run(folder), root/'nbs'/'experiments'/'photographs'/'model'
    target = root/'sagan'/'runs'/'photographs'
    target.mkdir(parents=True, exist_ok=True)
    shown.mkdir(parents=True, exist_ok=True)
    def rename(text): return text.replace(run.cfg.data, 'cifar10')
    run.model.cfg = run.cfg.change(data='cifar10')
    save_weights(target/'weights.safetensors', run.model, run.step, bfloat16=True)
    config = (folder/'config.json').read_text(encoding='utf-8')
    (target/'config.json').write_text(rename(config), encoding='utf-8')
    kept = [r for r in read_log(folder) if r['step'] <= run.step and ('fid' in r or r['step'] % 100 == 0)]
    lines = (json.dumps(r) + '\n' for r in kept)
    (target/'log.jsonl').write_text(rename(''.join(lines)), encoding='utf-8')
    scores = check_photographs(load_run(target), folder, data, shown)
    (shown/'scores.json').write_text(rename(json.dumps(scores, indent=1)) + '\n', encoding='utf-8')
    save_figure(draw_photographs(load_run(target)), root/'nbs'/'images'/'photographs.png')
    for step in GRIDS:
        grid = folder/'samples'/f'step-{step:07}.png'
        if grid.exists(): shutil.copy(grid, shown)


def draw_photographs(run: Run) -> Figure:
    "README's picture: where three points of three generated images look"
    y = torch.tensor([run.classes.index(name) for name in ('automobile', 'horse', 'ship')])
    z = torch.randn(len(y), run.cfg.z_dim, generator=torch.Generator().manual_seed(0))
    x, maps = attention_maps(run.model.ema, z, y)
    return attention_figure(x, maps[-1])


def check_photographs(run: Run, folder: Path, data: Path, shown: Path) -> dict:
    "The scores of the rounded weights, which must be those of the log, and the nearest training images"
    images = replace(load_images(str(data), run.cfg.size), name='cifar10')
    evaluator = load_or_train_evaluator(folder/'evaluator.pt', images)
    real = reference(images, evaluator)
    scores = measure_generator(run.model.ema, images, evaluator, real, 5000)
    logged = [r for r in run.records if 'fid' in r][-1]
    if logged['step'] == run.step and abs(scores['fid'] - logged['fid']) > .02:
        raise ValueError(f"FID is {scores['fid']:.3f}, but the log says {logged['fid']:.3f}")
    # a reference keeps the features of 10,000 images only, so we search the images
    save_figure(draw_nearest(run.model.ema, images, evaluator, images, 500), shown/'nearest.png')
    some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:5000]
    part = reference(images[some], evaluator)
    floor = frechet_distance(part.mu, part.sigma, real.mu, real.sigma)  # what as many real images get
    return scores | dict(fid_of_real=floor, step=run.step)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('run', type=Path, nargs='?', help='folder of the run of photographs')
    p.add_argument('data', type=Path, nargs='?', help='its images')
    args = p.parse_args()
    if args.run: ship_photographs(args.run, args.data)
    else:
        ship_twins(Path('runs')/'claim-long')
        ship_digits()
