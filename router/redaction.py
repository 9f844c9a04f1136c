"""Takes keys and e-mail addresses out of a text before it is kept."""

from __future__ import annotations

import re

from router.upstream import Scrubber

# Beside what every message to a client is cleared of: keys that can be told by their form, as people paste them.
_KEYS = re.compile(
    r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.{1,16384}?-----END [A-Z ]*PRIVATE KEY-----|[\sA-Za-z0-9+/=\\]*)"
    r"|\b(?:gh[opusr]|github_pat|glpat|hf|xox[abeoprs]|npm|pypi|dckr_pat|shpat|whsec|SG)[-_.][A-Za-z0-9_\-.]{10,}"
    r"|\beyJ[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]{8,}\.[A-Za-z0-9_\-]*"  # a signed token
    r"|(?<=://)[^\s/@:]{1,256}:[^\s/@]{1,256}(?=@)",  # a user and password in a URL
    re.DOTALL,
)

# Possessive, and only from the start of a word: linear in the length of any text.
_EMAIL = re.compile(r"(?<![\w.%+\-])[\w.%+\-]++@[\w\-]++(?:\.[\w\-]++)+")

_scrub = Scrubber(())


def redact(text: str) -> str:
    """The text with ``[key]`` for what looks like a key, a token or a password, and ``[email]`` for e-mail addresses.

    It goes by form: a secret that looks like any other word stays.
    """
    text = _scrub(_KEYS.sub("[key]", text))
    return _EMAIL.sub("[email]", text) if "@" in text else text
