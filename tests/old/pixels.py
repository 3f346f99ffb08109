"An evaluator that needs no training: the mean colours of the quarters of an image"
import torch.nn as nn, torch.nn.functional as F
from sagan.evaluation import Evaluator


class Quarters(nn.Module):
    def forward(self, x): return F.adaptive_avg_pool2d(x, 2).flatten(1)        # (B, 3, S, S) -> (B, 12)


def evaluator():
    "The evaluator of the experiment in `folders.tar.xz`"
    return Evaluator(Quarters(), 'mean colours of the quarters')
