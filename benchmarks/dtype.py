"""Agreement of twins after the same training in float32 and in bfloat16: the row table1-feat64 of page 11's first experiment.

    python benchmarks/dtype.py float32 0 bfloat16 0 bfloat16 1    # pairs of dtype and seed; 3 to 6 minutes each on one core
    python benchmarks/dtype.py bfloat16 0 --out nbs/benchmarks/dtype.json"""
import argparse, json, time, torch, warnings
warnings.filterwarnings('ignore')
from pathlib import Path
from sagan.checkpoints import load_run, shipped
from sagan.data import image_dls, twin_agreement, twin_pairs, twins
from sagan.networks import generate
from sagan.training import sagan_learner

def run(dtype, seed):
    "Train as the shipped run of twins, and measure 1,000 samples"
    cfg, images, start = load_run(shipped('twins')).cfg.change(dtype=dtype, seed=seed), twins(), time.perf_counter()
    learn = sagan_learner(image_dls(images, cfg.batch, steps=cfg.steps, seed=seed), cfg)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    x = generate(learn.model.ema, y=torch.arange(4).repeat_interleave(250), seed=0)   # (1000, 3, 32, 32)
    return dict(dtype=dtype, seed=seed, agreement=twin_agreement(x), pairs=twin_pairs(x), seconds=time.perf_counter() - start)

if __name__ == '__main__':
    p = argparse.ArgumentParser(); p.add_argument('runs', nargs='+'); p.add_argument('--out', type=Path)
    args = p.parse_args(); torch.set_num_threads(1)
    rows = json.loads(args.out.read_text()) if args.out and args.out.exists() else []
    for dtype, seed in zip(args.runs[::2], args.runs[1::2]):
        rows.append(run(dtype, int(seed))); print(rows[-1], flush=True)
        if args.out: args.out.write_text(json.dumps(rows, indent=1) + '\n')
