"""Every way in which a provider can fail, against the page that says what a client sees of it."""

from __future__ import annotations

from faults import MARKER, PAGE, page


def test_the_page_of_faults_is_what_a_client_sees() -> None:
    _, marker, written = PAGE.read_text(encoding="utf-8").partition(MARKER)
    assert marker
    assert page() == written, "a change of what clients see: python tests/faults.py --write"
