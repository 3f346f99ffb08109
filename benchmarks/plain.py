"""The same networks and the same training step as public implementations write them: the baseline of step.py.

Spectral norm by PyTorch's hook in every forward pass, softmax(QK) as a stored matrix, upsampling before and
pooling after each 3x3 convolution, one pass of D for real and one for fake images, gradients for D's weights
in G's step, float32, NCHW, one Adam launch per parameter, averaging parameter by parameter."""
import torch, torch.nn as nn, torch.nn.functional as F
from torch.nn.utils import spectral_norm as sn
from sagan.networks import D_CHANNELS, D_DOWN, G_CHANNELS

def conv(c_in, c_out, size, bias=True): return sn(nn.Conv2d(c_in, c_out, size, padding=size//2, bias=bias))

class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.query, self.key, self.value = [conv(c, n, 1, False) for n in (c//8, c//8, c)]
        self.gamma = nn.Parameter(torch.zeros(()))
    def forward(self, x):
        q, k, v = [f(x).flatten(2) for f in (self.query, self.key, self.value)]  # (B, C', N)
        beta = torch.bmm(q.permute(0, 2, 1), k).softmax(-1)                      # (B, N, N)
        return self.gamma*torch.bmm(v, beta.permute(0, 2, 1)).view_as(x) + x     # (B, C, H, W)

class Norm(nn.Module):
    def __init__(self, c, n_classes):
        super().__init__()
        self.bn = nn.BatchNorm2d(c, affine=False)
        self.gain, self.bias = nn.Embedding(n_classes, c), nn.Embedding(n_classes, c)
    def forward(self, x, y):
        return (1 + self.gain(y))[..., None, None]*self.bn(x) + self.bias(y)[..., None, None]

class GBlock(nn.Module):
    def __init__(self, c_in, c_out, n_classes):
        super().__init__()
        self.bn1, self.conv1 = Norm(c_in, n_classes), conv(c_in, c_out, 3)
        self.bn2, self.conv2 = Norm(c_out, n_classes), conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1)
    def forward(self, x, y):
        h = self.conv1(F.interpolate(F.relu(self.bn1(x, y)), scale_factor=2))
        return self.conv2(F.relu(self.bn2(h, y))) + self.skip(F.interpolate(x, scale_factor=2))

class DBlock(nn.Module):
    def __init__(self, c_in, c_out, down, first):
        super().__init__()
        self.down, self.first = down, first
        self.conv1, self.conv2 = conv(c_in, c_out, 3), conv(c_out, c_out, 3)
        self.skip = conv(c_in, c_out, 1) if down or c_in != c_out else nn.Identity()
    def forward(self, x):
        h = self.conv2(F.relu(self.conv1(x if self.first else F.relu(x))))
        return F.avg_pool2d(h, 2) + F.avg_pool2d(self.skip(x), 2) if self.down else h + self.skip(x)

class Generator(nn.Module):
    def __init__(self, size, n_classes, width, attention):
        super().__init__()
        ch = [m*width for m in G_CHANNELS[size]]
        self.linear = sn(nn.Linear(128, 16*ch[0]))
        self.blocks = nn.ModuleList([GBlock(a, b, n_classes) for a, b in zip(ch, ch[1:])])
        self.sizes = [8 << i for i in range(len(ch)-1)]
        self.attention = nn.ModuleDict({str(attention): Attention(ch[1:][self.sizes.index(attention)])})
        self.bn, self.conv = nn.BatchNorm2d(ch[-1]), conv(ch[-1], 3, 3)
    def forward(self, z, y):
        x = self.linear(z).view(len(z), -1, 4, 4)
        for size, block in zip(self.sizes, self.blocks):
            x = block(x, y)
            if str(size) in self.attention: x = self.attention[str(size)](x)
        return self.conv(F.relu(self.bn(x))).tanh()

class Discriminator(nn.Module):
    def __init__(self, size, n_classes, width, attention):
        super().__init__()
        ch = [m*width for m in D_CHANNELS[size]]
        blocks = [DBlock(a, b, i < D_DOWN[size], i == 0) for i, (a, b) in enumerate(zip([3, *ch], ch))]
        self.blocks = nn.ModuleList(blocks)
        self.sizes = [size >> min(i+1, D_DOWN[size]) for i in range(len(ch))]
        self.attention = nn.ModuleDict({str(attention): Attention(ch[self.sizes.index(attention)])})
        embed = sn(nn.Embedding(n_classes, ch[-1]))
        self.head = nn.ModuleDict(dict(linear=sn(nn.Linear(ch[-1], 1)), embed=embed))
    def forward(self, x, y):
        for size, block in zip(self.sizes, self.blocks):
            x = block(x)
            if block.down and str(size) in self.attention: x = self.attention[str(size)](x)
        h = F.relu(x).sum((2, 3))
        return self.head['linear'](h).squeeze(1) + (self.head['embed'](y)*h).sum(1)

def names(state):
    "The state of our network under the names of these networks"
    def rename(k):
        k = k.replace('parametrizations.weight.original', 'weight_orig')
        return k.replace('parametrizations.weight.0.', 'weight_')
    return {rename(k): v for k, v in state.items()}

class Plain:
    "Both networks of a `Config` with its weights, their optimisers and the average"
    def __init__(self, cfg, model, device='cpu'):
        def build(kind, width, at): return kind(cfg.size, cfg.n_classes, width, at[0]).to(device)
        self.G, self.ema = [build(Generator, cfg.g_width, cfg.g_attention) for _ in range(2)]
        self.D = build(Discriminator, cfg.d_width, cfg.d_attention)
        for net, ours in (self.G, model.G), (self.ema, model.G), (self.D, model.D):
            net.load_state_dict(names(ours.state_dict()))
        def adam(net, lr):
            return torch.optim.Adam(net.parameters(), lr, (cfg.beta1, cfg.beta2), foreach=False, fused=False)
        self.opt_g, self.opt_d, self.decay = adam(self.G, cfg.lr_g), adam(self.D, cfg.lr_d), cfg.ema

    def step(self, x, y, z, y_fake, z2, y2):
        self.opt_d.zero_grad()
        loss = F.relu(1 - self.D(x, y)).mean() + F.relu(1 + self.D(self.G(z, y_fake).detach(), y_fake)).mean()
        loss.backward()
        self.opt_d.step()
        self.opt_g.zero_grad()
        g_loss = -self.D(self.G(z2, y2), y2).mean()
        g_loss.backward()
        self.opt_g.step()
        with torch.no_grad():
            for a, p in zip(self.ema.parameters(), self.G.parameters()):
                a.mul_(self.decay).add_(p, alpha=1 - self.decay)
        return loss.item(), g_loss.item()
