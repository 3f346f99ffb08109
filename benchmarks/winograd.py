"""Winograd's 3x3 convolution by matrix products, against PyTorch's, forward on one CPU thread.

F(2x2, 3x3) needs 16 multiplications where a 3x3 convolution needs 36. It adds and subtracts the inputs and
the outputs, and transforms the weight, which every training step changes.

    python benchmarks/winograd.py"""
import time, torch, torch.nn.functional as F
from sagan.kernels import keep_freed_memory

# Images in a batch, channels in and out, size of the map
SHAPES = [(8, 1024, 1024, 8), (16, 512, 512, 16), (8, 512, 512, 16), (16, 256, 256, 32), (16, 128, 128, 64)]

def transform_input(x):
    "Tiles of 4x4, (16, tiles, C), of a map (B, C, H, W)"
    x = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))                 # (B, H + 2, W + 2, C)
    def combine(a): return a[0] - a[2], a[1] + a[2], a[2] - a[1], a[1] - a[3]
    rows = combine([x[:, i:x.shape[1] - 2 + i:2] for i in range(4)])     # 4 of (B, H/2, W + 2, C)
    tiles = [combine([r[:, :, i:r.shape[2] - 2 + i:2] for i in range(4)]) for r in rows]
    return torch.stack([t.flatten(0, 2) for row in tiles for t in row])

def transform_weight(w):
    "(16, C, C') of a weight (C', C, 3, 3)"
    def combine(a):
        s = a[0] + a[2]
        return torch.stack([a[0], (s + a[1])/2, (s - a[1])/2, a[2]])
    w = combine(w.permute(2, 3, 1, 0))                                   # (4, 3, C, C')
    return combine(w.transpose(0, 1)).transpose(0, 1).flatten(0, 1)

def transform_output(m, B, size):
    "Maps (B, C', H, W) of tiles (16, tiles, C')"
    m = m.unflatten(1, (B, size//2, size//2)).unflatten(0, (4, 4))
    def combine(a): return torch.stack([a[0] + a[1] + a[2], a[1] - a[2] - a[3]])
    m = combine(m)                                                       # (2, 4, B, H/2, W/2, C')
    m = combine(m.transpose(0, 1))                                       # (2, 2, ...), columns first
    return m.permute(2, 5, 3, 1, 4, 0).flatten(4, 5).flatten(2, 3)

def winograd(x, U): return transform_output(transform_input(x) @ U, len(x), x.shape[2])

def milliseconds(f, repeats=4):
    "Least CPU time, after one call to warm up"
    times = []
    for _ in range(repeats):
        start = time.process_time()
        f()
        times.append(1e3*(time.process_time() - start))
    return min(times[1:])

if __name__ == '__main__':
    torch.set_num_threads(1)
    keep_freed_memory()
    print('| dtype | batch | channels | map | PyTorch, ms | Winograd, ms | weight, ms | error |')
    print('|---'*8 + '|')
    for dtype in (torch.float32, torch.bfloat16):
        for B, C, out, size in SHAPES:
            torch.manual_seed(0)
            x, w = torch.randn(B, C, size, size), torch.randn(out, C, 3, 3)/(3*C**.5)
            x, w = [t.to(dtype=dtype, memory_format=torch.channels_last) for t in (x, w)]
            U, y = transform_weight(w), F.conv2d(x, w, padding=1)
            error = ((winograd(x, U) - y).norm()/y.norm()).item()
            calls = [lambda: F.conv2d(x, w, padding=1), lambda: winograd(x, U), lambda: transform_weight(w)]
            ms = [f'{milliseconds(f):.0f}' for f in calls]
            row = str(dtype)[6:], B, f'{C}, {out}', f'{size}x{size}', *ms, f'{error:.0e}'
            print(f"| {' | '.join(map(str, row))} |", flush=True)
