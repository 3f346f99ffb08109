"""Winograd's 3x3 convolution (sagan.winograd) against PyTorch's, forward and backward on one CPU thread.

    python benchmarks/winograd.py --out FILE.json       # about two minutes"""
import argparse, json, time, torch, torch.nn.functional as F
from pathlib import Path
from sagan.kernels import keep_freed_memory
from sagan.winograd import is_winograd_faster, winograd_conv
from step import machine

# Images in a batch, channels in and out, size of the map
SHAPES = [(16, 64, 64, 64), (16, 64, 128, 64), (64, 128, 128, 16), (8, 128, 128, 64), (64, 256, 256, 8),
          (64, 256, 256, 32), (8, 256, 256, 32), (8, 512, 512, 16), (16, 512, 1024, 8), (8, 1024, 1024, 8)]

def plain_conv(x, w): return F.conv2d(x, w, padding=1)

def milliseconds(f, x, w, repeats=3):
    "Least CPU time of a forward and backward pass, after one to warm up"
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        y = f(x, w)
        torch.autograd.grad(y, (x, w), y)
        times.append(1e3*(time.process_time() - start))
    return min(times[1:])

def error(f, x, w):
    "Relative error against float64, of at most four images"
    x = x[:4].detach()
    exact = plain_conv(x.double(), w.detach().double())
    return ((f(x, w.detach()) - exact).norm()/exact.norm()).item()

def measure(dtype, B, C, out, size):
    "One row"
    torch.manual_seed(0)
    x, w = torch.randn(B, C, size, size), torch.randn(out, C, 3, 3)/(3*C**.5)
    x, w = [t.to(dtype=dtype, memory_format=torch.channels_last).requires_grad_() for t in (x, w)]
    row = dict(dtype=str(dtype)[6:], batch=B, channels=(C, out), size=size, chosen=is_winograd_faster(x, out))
    forms = dict(plain=plain_conv, winograd=winograd_conv)
    row |= {name: milliseconds(f, x, w) for name, f in forms.items()}
    row |= {f'{name}_error': error(f, x, w) for name, f in forms.items()}
    print(row, flush=True)
    return row

if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--out', help='file for the numbers, as JSON')
    a = p.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [measure(dtype, *shape) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
    about = dict(machine=machine('cpu'), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    if a.out: Path(a.out).write_text(json.dumps(about | dict(rows=rows), indent=1), encoding='utf-8')
