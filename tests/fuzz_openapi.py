"""``make test-schemathesis``: requests made from the description at /openapi.json, right and wrong ones, find no 5xx.

The router runs here, in front of the loopback provider; schemathesis runs from an environment of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from running import running

# What the description and the answers have to agree on. That wrong bodies are refused is left out: what a dialect's
# provider takes, the provider knows, and the description leaves it open.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "unsupported_method",
    "allow_header_conformance",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--schemathesis", required=True, help="the command, in its own environment")
    parser.add_argument("--max-examples", type=int, default=200, help="requests of each operation")
    parser.add_argument("--seed", type=int, default=20)
    arguments = parser.parse_args()
    # Whatever is asked for goes to the provider, and the model's names of its failures are not known there.
    tier = {"default": "cheap"}
    with running(tiers={"auto": tier}, aliases={"*": "auto"}) as router:
        command = [
            *(arguments.schemathesis, "run", f"{router.url}/openapi.json"),
            *("--checks", ",".join(CHECKS)),
            *("--max-examples", str(arguments.max_examples)),
            *("--seed", str(arguments.seed)),
            *("--continue-on-failure", "--request-timeout", "20"),
        ]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
