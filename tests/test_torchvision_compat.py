"""torchvision imports in a fresh process, whether its extension loads or not, and is faked only then."""

import subprocess
import sys

CHECK = """
import genie.torchvision_compat as compat
first = compat.declare_missing_operators()
assert compat.declare_missing_operators() == first
import torch, torchvision
from torchvision.models import resnet18
assert first == (not torchvision.extension._has_ops()), "declared beside the real ones"
with torch.no_grad():
    assert resnet18().eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
"""


def test_torchvision_imports_after_the_module_and_repeating_it_changes_nothing():
    done = subprocess.run([sys.executable, "-c", CHECK], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
