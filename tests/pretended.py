"""A GPU that is none: its tensors compute on the CPU, but refuse to meet tensors of the CPU, and float64

So what was left on the wrong device fails here as it would on a GPU, and a Mac's lack of float64 shows.
Kernels are those of the CPU. The device is called `pretended`; `sagan.devices` takes it for `mps`."""
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

NAME = 'pretended'


class There(Tensor):
    "A tensor on the pretended GPU; `here` holds its numbers"
    @staticmethod
    def __new__(cls, here):
        return Tensor._make_wrapper_subclass(
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            device=NAME)
    def __init__(self, here): self.here = here
    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None): return compute(op, args, kwargs or {})


def sent(here):
    if here.dtype == torch.float64: raise TypeError("the MPS framework doesn't support float64")
    return There(here)


def compute(op, args, kwargs):
    "An operation on tensors here or there; only copies, indices and single numbers go between"
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [t for t in tensors if isinstance(t, There)]
    mixed = any(t.ndim for t in tensors if not isinstance(t, There)) and there
    if mixed and not any(name in op.name() for name in ('copy', 'aten::index.')):
        raise RuntimeError(f'{op.name()}: expected all tensors to be on the same device')
    device = kwargs.get('device')
    goes_there = bool(there) if device is None else torch.device(device).type == NAME
    if device is not None: kwargs = kwargs | dict(device='cpu')
    out = op(*tree_map_only(There, lambda t: t.here, args), **tree_map_only(There, lambda t: t.here, kwargs))
    known = {id(t.here): t for t in there}  # what changed in place
    known |= {id(t): t for t in tensors}
    def place(t): return known.get(id(t)) if id(t) in known else sent(t) if goes_there else t
    return tree_map_only(Tensor, place, out)


class Pretended(TorchDispatchMode):
    "Within this context tensors can be made on, and sent to, the pretended GPU"
    def __torch_dispatch__(self, op, types, args=(), kwargs=None): return compute(op, args, kwargs or {})


class _Module:
    "What PyTorch asks of `torch.pretended`"
    available = False  # only while a test uses it: PyTorch's fake tensors ask
    def is_initialized(self): return True
    def is_available(self): return self.available
    def current_device(self): return 0
    def device_count(self): return 1
    def _is_in_bad_fork(self): return False
    def manual_seed_all(self, seed): pass
    def get_amp_supported_dtype(self): return [torch.bfloat16, torch.float16]


def set_up():
    "Make the name of the device known to PyTorch, once per process; raises `ImportError` before 2.9"
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as set_up
    if not hasattr(torch, NAME): set_up(NAME, _Module())
