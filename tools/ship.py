"""Train the two runs that come with the package, and put what is needed of them into sagan/runs.

    python tools/ship.py    # about nine minutes on one core

Digits is the default run. Twins is the row `claim-both` of page 17, and its seed is chosen by a rule
that was written down before the five were trained: the one whose kappa is the median of the five in
nbs/experiments/claim. The run must have learned agreement, or nothing is shipped."""
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

os.environ['OMP_NUM_THREADS'] = '1'  # as in the experiment, for the same numbers
from sagan.checkpoints import load_run, measure_generator
from sagan.data import twins
from sagan.evaluation import reference, train_evaluator
from sagan.experiments import load_experiment

root = Path(__file__).resolve().parent.parent
FILES = 'config.json', 'weights.safetensors', 'log.jsonl'
# What a run that has learned agreement has at least; luck and chance are 0 and 0.5
KAPPA, AUC = .1, .55


def choose_seed(experiment: Path = root/'nbs'/'experiments'/'claim') -> int:
    "The seed of `claim-both` with the median kappa"
    seeds = next(s for line, s in load_experiment(experiment) if line.name == 'claim-both')
    kappas = [records[-1]['kappa'] for records in seeds]
    return kappas.index(median(kappas))


def measure_twins(folder: Path) -> dict:
    "The scores of a run on twins, on 1,000 samples"
    images = twins()
    evaluator = train_evaluator(images)
    model = load_run(folder).model
    return measure_generator(model.ema, images, evaluator, reference(images, evaluator), 1000, D=model.D)


def check_learned(scores: dict):
    "Raise `ValueError` for a run that did not learn agreement"
    for name, least in (('kappa', KAPPA), ('d_auc', AUC)):
        if scores[name] < least:
            raise ValueError(f"{name} is {scores[name]:.3f}, which is below {least}: the run did not learn that twins agree")


def train(folder: Path, *options: str):
    "A run by the command that users have"
    command = Path(sys.executable).parent/'sagan-train'
    subprocess.run([command, *options, '--out', folder], check=True)


def ship(folder: Path, name: str):
    "Put the files that the package needs into sagan/runs"
    target = root/'sagan'/'runs'/name
    target.mkdir(parents=True, exist_ok=True)
    for file in FILES: shutil.copy(folder/file, target)


if __name__ == '__main__':
    names = sys.argv[1:] or ['digits', 'twins']
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)
        if 'digits' in names:
            train(folder/'digits')
            ship(folder/'digits', 'digits')
        if 'twins' in names:
            seed = choose_seed()
            train(folder/'twins', '--data', 'twins', '--steps', '2400', '--dtype', 'float32', '--seed', str(seed))
            scores = measure_twins(folder/'twins')
            check_learned(scores)
            ship(folder/'twins', 'twins')
            print(f"twins: seed {seed}, kappa {scores['kappa']:.3f}, D's AUC {scores['d_auc']:.3f}")
