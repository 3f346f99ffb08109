"A network that measures without training: the mean colours of the quarters of an image"
import torch.nn as nn, torch.nn.functional as F

NAME = 'mean colours of the quarters'


class Quarters(nn.Module):
    def forward(self, x): return F.adaptive_avg_pool2d(x, 2).flatten(1)        # (B, 3, S, S) -> (B, 12)
