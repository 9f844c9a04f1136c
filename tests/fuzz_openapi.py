"""``make test-schemathesis``: requests made from the description at /openapi.json, right and wrong ones, find no 5xx.

The router runs here, with a ledger and a budget, in front of the loopback provider; schemathesis runs from an environment
of its own.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

from provider import provider
from running import ENVIRONMENT, WordPredictor, serve_gateway

from router.budget_store import open_store
from router.gateway import Gateway
from router.ledger import Ledger
from router.policy import Policy
from router.purse import Purse

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
    with ExitStack() as stack:
        upstream = stack.enter_context(provider())
        target = {"model": "openai/small", "api_base": upstream.url, "api_key_env": "TEST_PROVIDER_KEY"}
        policy = Policy.model_validate(
            {
                "version": 1,
                "targets": {"cheap": {**target, "prices": {"input": 1, "output": 4}}},
                "tiers": {"auto": {"default": "cheap"}},
                "default_tier": "auto",
                "aliases": {"*": "auto"},
                "budgets": {"workload": {"month": 1000}},
            }
        )
        folder = Path(stack.enter_context(TemporaryDirectory()))
        ledger = Ledger(str(folder / "ledger.sqlite3")).open()
        purse = Purse(open_store(str(folder / "budgets.sqlite3"))).open()
        gateway = Gateway(policy, WordPredictor(), ENVIRONMENT, ledger=ledger, purse=purse)
        url = stack.enter_context(serve_gateway(gateway))
        command = [
            *(arguments.schemathesis, "run", f"{url}/openapi.json"),
            *("--checks", ",".join(CHECKS)),
            *("--max-examples", str(arguments.max_examples)),
            *("--seed", str(arguments.seed)),
            *("--continue-on-failure", "--request-timeout", "20"),
        ]
        sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    main()
