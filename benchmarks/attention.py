"""Equations 1 and 2, forward and backward on the CPU: the two plain lines, PyTorch's fused call (direct, and
on tensors padded to equal widths), and our blocks of rows. Times at sizes of the networks and at 16,384
locations; then peak memory, each in a separate process.

    python benchmarks/attention.py --out FILE.json"""
import argparse, json, statistics, subprocess, sys, time, torch, torch.nn.functional as F
from pathlib import Path
from sagan.attention import attention_weights
from sagan.kernels import blockwise_attention, fused_attention, is_blockwise_faster
from step import machine

def explicit(q, k, v): return attention_weights(q, k) @ v
def direct(q, k, v): return F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], scale=1.)[:, 0]
FORMS = dict(explicit=explicit, direct=direct, fused=fused_attention, blocks=blockwise_attention)

# batch, queries, keys, width of queries and keys, width of values
SHAPES = ((64, 256, 64, 32, 128), (64, 256, 256, 32, 256), (128, 256, 256, 16, 128),
          (8, 1024, 1024, 32, 256), (16, 1024, 1024, 16, 128), (16, 1024, 256, 16, 64),
          (4, 4096, 4096, 16, 128), (8, 4096, 1024, 16, 64), (4, 4096, 4096, 8, 32), (4, 4096, 4096, 16, 16),
          (1, 16_384, 16_384, 8, 64), (1, 16_384, 16_384, 64, 64))

def inputs(B, Nq, Nk, D, Dv, dtype):
    g = torch.Generator().manual_seed(0)
    sizes = (Nq, D), (Nk, D), (Nk, Dv)
    return [torch.randn(B, n, d, generator=g).to(dtype).requires_grad_() for n, d in sizes]

def forward_and_backward(f, qkv):
    o = f(*qkv)
    torch.autograd.grad(o, qkv, o)

def seconds(f, qkv, repeats=3):
    "Median seconds of a forward and backward pass, after one to warm up"
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        forward_and_backward(f, qkv)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])

def memory(form, N):
    """GB by which the process grows over one forward and backward pass
    of one image with 64 channels and values as wide as in the preprint's form"""
    qkv, small = inputs(1, N, N, 8, 64, torch.float32), inputs(1, 64, 64, 8, 64, torch.float32)
    forward_and_backward(FORMS[form], small)  # what the first call loads does not count
    def peak():
        "The process's peak memory in GB; known only on Linux"
        if sys.platform != 'linux': return float('nan')
        return int(Path('/proc/self/status').read_text('utf-8').split('VmHWM:')[1].split()[0])/1e6
    before = peak()
    forward_and_backward(FORMS[form], qkv)
    return peak() - before

def memory_in_a_process(form, N):
    command = [sys.executable, __file__, '--memory', form, str(N)]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)

def time_shape(dtype, B, Nq, Nk, D, Dv):
    "Seconds of each form, and the form that `attend` takes"
    qkv = inputs(B, Nq, Nk, D, Dv, dtype)
    lean = 'blocks' if is_blockwise_faster(qkv[0], qkv[2]) else 'fused'
    taken = 'explicit' if B*Nq*Nk <= 2**23 else lean
    sizes = dict(batch=B, queries=Nq, keys=Nk, width=D, width_of_values=Dv)
    return dict(dtype=str(dtype)[6:], **sizes, taken=taken) | {k: seconds(f, qkv) for k, f in FORMS.items()}

def note(row):
    print(row, flush=True)
    return row

if __name__ == '__main__':
    p = argparse.ArgumentParser()
    p.add_argument('--out', help='file for the numbers, as JSON')
    p.add_argument('--memory', nargs=2, help='a form and a number of locations: print its GB')
    a = p.parse_args()
    if a.memory:
        print(memory(a.memory[0], int(a.memory[1])))
        sys.exit()
    times = [note(time_shape(dtype, *shape)) for dtype in (torch.float32, torch.bfloat16) for shape in SHAPES]
    sizes = 4096, 8192, 16384
    gb = [note(dict(locations=N) | {form: memory_in_a_process(form, N) for form in FORMS}) for N in sizes]
    about = dict(machine=machine('cpu'), torch=torch.__version__, date=time.strftime('%Y-%m-%d'))
    if a.out: Path(a.out).write_text(json.dumps(about | dict(times=times, memory=gb), indent=1), 'utf-8')
