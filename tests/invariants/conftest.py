import sys
from pathlib import Path

# The tiny world is imported by name from the files beside it.
sys.path.insert(0, str(Path(__file__).parent))
