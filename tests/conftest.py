"""What all tests share: reproducible data, few threads, few examples."""

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))
if not torch.cuda.is_available():
    # Triton reads this when a kernel is defined: without a GPU its kernels are run by its interpreter, on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A few examples of every property; tests/fuzz.py has the long profile.
hypothesis.settings.register_profile("ci", max_examples=15, deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci")


@pytest.fixture(autouse=True)
def subnormal_numbers():
    """What torch compiled before 2.6 flushes them to zero from its loading on; hypothesis then refuses to draw."""
    torch.set_flush_denormal(False)


def views(n, dim, dtype=torch.float64, seed=0, noise=0.7):
    """Two correlated views with mean, scale and a random mixing of the features."""
    generator = torch.Generator().manual_seed(seed)
    content = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5 + torch.eye(dim)
    pair = []
    for _ in range(2):
        z = (content + noise * torch.randn(n, dim, generator=generator, dtype=torch.float64)) @ mixing + 1.5
        pair.append(z.to(dtype).requires_grad_())
    return pair
