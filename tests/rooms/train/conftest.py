import sys
from pathlib import Path

# Tiny policies come from the exact world of the invariant tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "invariants"))
