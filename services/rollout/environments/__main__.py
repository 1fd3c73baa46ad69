"""Whether environments and graders exist here: ``python -m services.rollout.environments NAME…``.

What a prompt names is checked before a run starts, not by its first leases.
"""

from __future__ import annotations

import sys

from services.rollout.environments import ENVIRONMENTS, make_environment
from singlestream.errors import ConfigError


def main(names: list[str]) -> int:
    """Make each once; exit code 1, and a line on stderr for each that cannot be made."""
    failed = 0
    for name in names:
        try:
            make_environment(name, tokenizer=None)
        except KeyError:
            known = ", ".join(ENVIRONMENTS)
            print(f"environment {name!r}: none of {known}, and no package.module:Class", file=sys.stderr)
            failed = 1
        except ConfigError as error:
            print(error, file=sys.stderr)
            failed = 1
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
