"Forward and backward of upsampling + 3x3 convolution and of 3x3 convolution + pooling: plain against the 4x4 form, in one run on the CPU"
import time, torch, torch.nn as nn, torch.nn.functional as F
from sagan import networks

def seconds(f, x, repeats):
    "Mean seconds of a forward and backward pass, after two to warm up"
    for i in range(repeats + 2):
        if i == 2: start = time.perf_counter()
        f(x).square().sum().backward()
    return (time.perf_counter() - start)/repeats

if __name__ == '__main__':
    rule = networks._rewrite
    print(f'{torch.get_num_threads()} threads\n| batch | channels | small map | chosen | upsampling: plain, ms | 4x4, ms | ratio | pooling: plain, ms | 4x4, ms | ratio |\n|---|---|---|---|---|---|---|---|---|---|')
    for B, C, S in [(16, 32, 8), (16, 32, 16), (16, 64, 16), (8, 256, 16), (8, 512, 8), (8, 64, 64), (8, 1024, 4)]:
        torch.manual_seed(0)
        conv = nn.Conv2d(C, C, 3, padding=1).to(memory_format=torch.channels_last)
        small, big = [torch.randn(B, C, s, s).contiguous(memory_format=torch.channels_last).requires_grad_() for s in (S, 2*S)]
        chosen, t = rule(small, conv), {}
        for form in (False, True):
            networks._rewrite = lambda x, conv: form
            t[form] = seconds(lambda x: networks.up_conv(conv, x), small, 5), seconds(lambda x: networks.conv_pool(conv, x), big, 5)
        (a, b), (c, d) = t[False], t[True]
        print(f'| {B} | {C} | {S}x{S} | {"4x4" if chosen else "plain"} | {a*1e3:.1f} | {c*1e3:.1f} | {a/c:.2f} | {b*1e3:.1f} | {d*1e3:.1f} | {b/d:.2f} |', flush=True)
