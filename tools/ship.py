"""Put the two runs that come with the package into sagan/runs.

    python tools/claim.py --only claim-long    # trains two runs on twins; about ten minutes on two idle cores
    python tools/ship.py                       # trains digits, chooses among the twins, checks, and copies

Digits is the default run. Twins is one of the longer runs of page 17, seeds 0 and 1: the one with the higher
kappa at its last step. It must have learned agreement, and its weights must give the scores that its log says."""
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from sagan.checkpoints import read_log
from sagan.runs import load_run, measure_generator
from sagan.data import twins
from sagan.references import reference, train_evaluator

root = Path(__file__).resolve().parent.parent
FILES = 'config.json', 'weights.safetensors', 'log.jsonl'
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
            raise ValueError(f"{name} is {scores[name]:.3f}, below {least}: this run did not learn that "
                             f"twins agree")


def ship(run: Path, name: str):
    "Copy what the package needs of a run into sagan/runs"
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
        said = last_scores(run)[name]
        if abs(scores[name] - said) > .01:
            raise ValueError(f"{name} is {scores[name]:.3f}, but the log says {said:.3f}")
    ship(run, 'twins')
    print(f"twins: {run.name}, kappa {scores['kappa']:.3f}, D's AUC {scores['d_auc']:.3f}")


if __name__ == '__main__':
    ship_twins(Path('runs')/'claim-long')
    ship_digits()
