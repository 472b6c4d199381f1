"""lm-eval's command with the model `flexgen`: ``python -m flexgen_helm.harnesses.lm_eval --model flexgen ...``.

lm-eval finds no models of other packages by itself. All options are lm-eval's own.
"""

from __future__ import annotations

import sys

from flexgen_helm.errors import FlexGenError


def main() -> int:
    """Register the model and run lm-eval's command; return its exit status."""
    try:
        from lm_eval.__main__ import cli_evaluate

        from flexgen_helm.harnesses.lm_eval_model import FlexGenLM
    except ImportError as error:
        print(f'lm-eval cannot be imported ({error}). Install it: pip install "flexgen_helm[lm-eval]"', file=sys.stderr)
        return 1
    assert FlexGenLM is not None  # its import registers it
    try:
        cli_evaluate()
    except FlexGenError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
