"""Tasks for lm-evaluation-harness that need no network; README.md beside this file lists them.

The harness reads them as files: ``TaskManager(include_path=FOLDER)`` or ``lm_eval --include_path``.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
