"""Tasks for lm-evaluation-harness without network access, listed in README.md beside this file.

The harness reads them as files: ``TaskManager(include_path=FOLDER)`` or ``lm_eval --include_path``.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
