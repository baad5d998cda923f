"""What importing the package does, in a process of its own."""

import subprocess
import sys


def test_nothing_is_said_by_others():
    """transformers would tell every session that PyTorch is missing."""
    code = "import jaxsteer; jaxsteer.generate; jaxsteer.search; import transformers"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
